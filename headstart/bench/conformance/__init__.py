"""Whether exported heads draft in another engine as they do here: their files, and the rounds of both engines."""
