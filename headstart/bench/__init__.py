"""Measuring drafters on equal footing: what it costs, what it earns, and whether the text is the same."""
