"""Other libraries: local modules in their own loops, runs in their trackers, models in their formats; a file each."""
