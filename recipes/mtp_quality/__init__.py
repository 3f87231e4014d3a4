"""Does a trunk that predicts several tokens at once speak better? The experiment of Gloeckle et al. 2024, made very small:
`python -m recipes.mtp_quality.quality`, then `python -m recipes.mtp_quality.after`."""
