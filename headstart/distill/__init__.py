"""The target's own answers as training data, by this engine or by an OpenAI-compatible endpoint."""
