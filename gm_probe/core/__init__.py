"""Errors, files, data, models, checkpoints, flat parameters and run records. Imports nothing above it."""
