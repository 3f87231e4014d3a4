"""Text: tokenizers, chat templates, conversations, prompt files and JSONL."""
