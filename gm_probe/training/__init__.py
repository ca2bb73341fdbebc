"""Gradient rules over plain torch optimizers, augmentation, schedules, and the training loop."""
