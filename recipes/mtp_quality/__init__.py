"""Is a trunk better if it is trained to predict several tokens? The experiment of Gloeckle et al. 2024, at a very small scale:
`python -m recipes.mtp_quality.quality`, then `python -m recipes.mtp_quality.after`."""
