"""Code shared by the image programs: configurations, data, training loop, and the experiment class that each completes."""
