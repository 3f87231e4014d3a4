"""Training of heads and pretraining of models: configuration, datasets, losses, the loop, checkpoints and logs."""
