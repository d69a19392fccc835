"""Planning: what a step costs in memory, before it runs."""
