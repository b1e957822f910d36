"""Machinery of all programs: configurations, run directories, results, checkpoints, processes, downloads."""
