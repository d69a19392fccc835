"""Training: data, optimizers, checkpoints, events and the loop."""
