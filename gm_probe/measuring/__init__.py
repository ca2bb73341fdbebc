"""From a checkpoint and a request to a table row: the only way by which checkpoints are measured."""
