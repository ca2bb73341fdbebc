"""A run is a folder: what its files say, and what they must be."""
