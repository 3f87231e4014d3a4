"""The mathematics of a round: trees, sampling, noise, verification, planners, calibration. Must not import transformers."""
