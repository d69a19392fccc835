"""Methods side by side: time and memory of their steps, observed; ratios, the Pareto front, pictures."""
