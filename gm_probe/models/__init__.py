"""Networks: how they are named, built, loaded from checkpoints, and seen as a function of their parameters."""
