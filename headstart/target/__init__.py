"""A Hugging Face causal LM that scores forests of drafts: loading, attention, KV cache and kernels."""
