"""The parts of the training loop: what a run is asked for, the order of its data, its features, checkpoints and reports."""
