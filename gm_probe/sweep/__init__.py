"""A grid of runs, each trained and measured, on this machine's processes."""
