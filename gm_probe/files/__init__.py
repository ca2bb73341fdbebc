"""The disk: files that are written whole or not at all, locks, schemas of records, and pickles that run no code."""
