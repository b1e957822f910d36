"""Rows as data; commands that run them, emit their scripts and submit them to Slurm; tables and figures of results."""
