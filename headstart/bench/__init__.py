"""Benchmarks of drafters: speed, acceptance, calibration, and whether the text is that of plain decoding."""
