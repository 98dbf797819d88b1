"""Searches for schedules: PHAST and exhaustive ones of a single row, and the ladder of rows by group of layers."""
