"""How much of a text repeats itself: repetition flatters every drafter."""

from collections.abc import Hashable, Sequence

NGRAM = 8


def loop_share(tokens: Sequence[Hashable], size: int = NGRAM) -> float:
    """The fraction of a text, in tokens or in words, that lies inside n-grams of `size` tokens which occurred in it before."""
    seen: set[tuple[Hashable, ...]] = set()
    repeated: set[int] = set()
    for start in range(len(tokens) - size + 1):
        ngram = tuple(tokens[start : start + size])
        if ngram in seen:
            repeated.update(range(start, start + size))
        seen.add(ngram)
    return len(repeated) / len(tokens) if tokens else 0.0


def first_loop(tokens: Sequence[int], size: int = NGRAM) -> int:
    """How many tokens come before the first n-gram of `size` tokens that occurred before; all of them where none did."""
    seen: set[tuple[int, ...]] = set()
    for start in range(len(tokens) - size + 1):
        ngram = tuple(tokens[start : start + size])
        if ngram in seen:
            return start
        seen.add(ngram)
    return len(tokens)
