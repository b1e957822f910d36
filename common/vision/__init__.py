"""Machinery of the image programs: their configurations, data, training loop, and the skeleton that each fills in."""
