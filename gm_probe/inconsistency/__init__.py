"""The heart of the paper: the KL divergence of two outputs, and the ascent of Algorithm 1."""
