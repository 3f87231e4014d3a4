"""Servers of a model with its heads: those of other engines. Must not import cli or bench."""
