"""KL divergence, Algorithm 1, curvature operators, their spectra, and the table of measures."""
