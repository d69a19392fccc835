"""Local objectives: weighted sums of named terms."""
