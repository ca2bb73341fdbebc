"""Examples: where they come from, how images are read, how they are normalised, split and cut into batches."""
