"""Rows as data, the verb that runs them, scripts and Slurm jobs, and tables and figures of results."""
