"""Gradient rules for plain torch optimizers, augmentation, schedules, and the training loop."""
