"""Two engines' answers to the same prompts, compared round by round.

A round emits the drafts that it keeps and one more token. The first round of an answer reads the prompt and drafts nothing.
Must not import torch or transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Decoded:
    """One answer.

    tokens: its token ids.
    rounds: how many of them each round emitted.
    Raises ValueError where the rounds do not emit all tokens.
    """

    tokens: tuple[int, ...]
    rounds: tuple[int, ...]

    def __post_init__(self) -> None:
        if sum(self.rounds) != len(self.tokens) or min(self.rounds, default=1) < 1:
            raise ValueError(f"rounds of {list(self.rounds)} tokens do not make up an answer of {len(self.tokens)} tokens")

    def kept(self, drafts: int) -> list[int]:
        """How many drafts were kept in each round after the first in which a whole chain could have been.

        drafts: length of the chain.
        """
        before = accumulate(self.rounds[:-1])
        return [count - 1 for count, done in zip(self.rounds[1:], before, strict=True) if len(self.tokens) - done > drafts]


@dataclass(frozen=True)
class Comparison:
    """Two engines' answers to the same prompts.

    texts, equal_texts: number of answers, and of those with the same tokens.
    rounds, equal_rounds: number of rounds of the engine that took more, summed over answers, and of those that emitted as many
        tokens in both.
    acceptance: per engine and position in the chain, the share of rounds that kept the draft there.
    """

    texts: int
    equal_texts: int
    rounds: int
    equal_rounds: int
    acceptance: tuple[tuple[float, ...], tuple[float, ...]]

    @property
    def is_equal(self) -> bool:
        """Whether both engines wrote the same and kept the same number of drafts in every round."""
        return self.equal_texts == self.texts and self.equal_rounds == self.rounds


def compare(ours: Sequence[Decoded], theirs: Sequence[Decoded], drafts: int) -> Comparison:
    """The comparison of two engines' answers. drafts: length of the chain."""
    pairs = list(zip(ours, theirs, strict=True))
    return Comparison(
        texts=len(pairs),
        equal_texts=sum(a.tokens == b.tokens for a, b in pairs),
        rounds=sum(max(len(a.rounds), len(b.rounds)) for a, b in pairs),
        equal_rounds=sum(one == other for a, b in pairs for one, other in zip(a.rounds, b.rounds, strict=False)),
        acceptance=(acceptance(ours, drafts), acceptance(theirs, drafts)),
    )


def acceptance(answers: Sequence[Decoded], drafts: int) -> tuple[float, ...]:
    """Per position in a chain of `drafts`, the share of rounds that kept the draft there; zeros where there was no round."""
    kept = [count for answer in answers for count in answer.kept(drafts)]
    return tuple(sum(count > position for count in kept) / max(1, len(kept)) for position in range(drafts))
