"""Schedules of local modules on many ranks: seconds and bytes in, seconds out."""
