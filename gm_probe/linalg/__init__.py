"""Spectral algorithms that see only products with a matrix: Lanczos, Hutchinson, spectral density."""
