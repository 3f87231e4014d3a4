"""Texts for teacher forcing: batches of them for training, and reading them with attached heads for drafting."""

import torch
from tiny import tiny

from headstart.drafters.parts.losses import Batch
from headstart.speculation.tree import Kept

TEXTS = [[5, 9, 3, 77, 12, 40, 8, 21, 33, 60], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]]


def states_of(tokens, taps=(-1,)):
    """[rows, length, taps * hidden] hidden states of the tiny target, by its own attention. tokens: [rows, length]."""
    with torch.no_grad():
        states = tiny().model(tokens, output_hidden_states=True).hidden_states
    return torch.cat([states[tap % tiny().num_layers + 1] for tap in taps], -1)


def batch_of(tokens, first_answer=1, taps=(-1,)):
    """The tokens, [rows, length], as a batch whose assistant begins at `first_answer`."""
    loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
    loss_mask[:, first_answer:] = True
    return Batch(tokens, loss_mask, states_of(tokens, taps), states_of(tokens))


def read_texts(heads, texts, root_positions):
    """Let attached heads read each text up to (not including) its root, in two pieces."""
    for first, last in ((0.0, 0.5), (0.5, 1.0)):
        spans = [(int(position * first), int(position * last)) for position in root_positions]
        features = torch.cat([states_of(torch.tensor([t]), heads.taps)[0, a:b] for t, (a, b) in zip(texts, spans, strict=True)])
        pieces = tuple(tuple(t[a : b + 1]) for t, (a, b) in zip(texts, spans, strict=True))
        seats = tuple(range(len(texts)))
        heads.extend(Kept(seats, pieces, tuple(a for a, _ in spans), (), (), features, features.device))
