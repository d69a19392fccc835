"""Experiments: published tables and our runs beside them, simulators of schedules, benchmarks. Not installed."""
