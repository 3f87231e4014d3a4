"""Texts that are forced on heads: their batches, and rows whose every choice is the true continuation."""

import torch
from tiny import tiny

from headstart.drafters.parts.losses import Batch
from headstart.speculation.tree import Kept

TEXTS = [[5, 9, 3, 77, 12, 40, 8, 21, 33, 60], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]]


def states_of(tokens, taps=(-1,)):
    """[rows, length, taps * hidden] states of the tiny target, by its own attention: its final ones, or those of other layers."""
    with tiny().original() as model, torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    return torch.cat([states[tap % tiny().num_layers + 1] for tap in taps], -1)


def batch_of(tokens, first_answer=1, taps=(-1,)):
    counts = torch.zeros_like(tokens, dtype=torch.bool)
    counts[:, first_answer:] = True
    return Batch(tokens, counts, states_of(tokens, taps), states_of(tokens))


def hear(heads, texts, places):
    """Let attached heads read each text up to (not including) its root, in two pieces."""
    for first, last in ((0.0, 0.5), (0.5, 1.0)):
        spans = [(int(place * first), int(place * last)) for place in places]
        features = torch.cat([states_of(torch.tensor([t]), heads.taps)[0, a:b] for t, (a, b) in zip(texts, spans, strict=True)])
        pieces = tuple(tuple(t[a : b + 1]) for t, (a, b) in zip(texts, spans, strict=True))
        seats = tuple(range(len(texts)))
        heads.extend(Kept(seats, pieces, tuple(a for a, _ in spans), (), (), features, features.device))
