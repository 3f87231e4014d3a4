"""The round over and over: requests, the scheduler, the engine, and the front door `LLM`."""
