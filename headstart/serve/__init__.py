"""Serving a model with its heads: this package's own server with OpenAI's interface, and the commands of other engines."""
