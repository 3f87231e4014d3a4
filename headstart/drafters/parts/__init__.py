"""What several methods share: heads, tree growth, decoder layers and losses. Must not import a method."""
