"""The published tables as data, and the runs that fill ours beside them."""
