"""What several drafting methods share: heads, tree growth, decoder layers and losses."""
