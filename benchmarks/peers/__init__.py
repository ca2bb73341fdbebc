"""The parts of measure_peers.py: one cell of the benchmark, its float64 reference, each peer's way, the table."""
