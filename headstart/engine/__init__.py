"""The engine: requests, the scheduler, rounds, and `LLM`, which puts a model, a drafter and an engine together."""
