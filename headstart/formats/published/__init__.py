"""Heads as others publish them: one file per publisher's format."""
