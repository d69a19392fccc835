"""Other libraries: local modules in their own loops, and runs in their trackers; a file each, behind its extra."""
