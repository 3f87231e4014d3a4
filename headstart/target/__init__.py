"""A Hugging Face causal language model that scores forests: its loading, its attention, its KV cache and its kernels."""
