"""Tables, statistics and plots over many runs. Reads run records and CSV only; never imports torch."""
