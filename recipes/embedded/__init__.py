"""The recipe of the embedded target and its draft sibling; README.md says how to run it."""
