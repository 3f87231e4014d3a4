"""The server: OpenAI's interface over HTTP, one engine thread, a fair queue before it, and metrics."""
