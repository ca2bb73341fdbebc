"""The table of measures, what they share, and one file a family."""
