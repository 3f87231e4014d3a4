"""The mathematics of a round: trees, sampling, noise, verification, planning, calibration. Imports torch and nothing above it."""
