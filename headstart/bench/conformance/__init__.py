"""Whether exported heads draft in another engine as they do here: the files against their manifest, and both engines round by round."""
