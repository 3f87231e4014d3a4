"""Measurements of OpenAI-compatible servers, other engines' included."""
