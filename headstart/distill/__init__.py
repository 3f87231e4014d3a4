"""Distillation: the target's own answers as training data, from this engine or from an OpenAI-compatible endpoint."""
