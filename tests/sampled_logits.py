"""Random logits, and sampling settings of all kinds with values at the borders of each truncation."""

import torch
from hypothesis import strategies as st

from headstart.speculation.params import SamplingParams

VOCAB = 50

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([1e-40, 1e-3, 0.3, 0.7, 1.0, 1.9, 50.0]),
    top_k=st.sampled_from([None, 1, 2, 5, VOCAB, 10**30]),
    top_p=st.sampled_from([None, 1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([None, 0.0, 0.05, 0.5, 1.0]),
)


def random_logits(lines: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(lines, vocab, generator=torch.Generator().manual_seed(seed))
