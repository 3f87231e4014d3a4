"""Everything with characters: tokenizers, chat templates, conversations, prompt files and JSONL."""
