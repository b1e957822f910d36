"""Machinery that all programs share: configurations, run directories, results, checkpoints, processes, downloads."""
