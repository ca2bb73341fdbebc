"""gm_probe: tell how well a trained classifier will generalize, from its checkpoint and unlabeled data."""
