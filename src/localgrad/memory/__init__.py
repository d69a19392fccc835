"""What a step costs in memory, before it runs."""
