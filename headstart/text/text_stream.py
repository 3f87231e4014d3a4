"""The streamed text of one answer, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headstart.text.detokenizer import Detokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Passes text through up to the first stop string, holding back only what may become one.

    The stop string that *completes* first wins, so the answer does not depend on how the text was cut into pieces. Among those that
    complete together, the longest wins.

    stops: the stop strings; a single string is one of them.
    Raises ValueError for an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if "" in stops:
            raise ValueError("a stop string is empty: it would stop before the first token; leave it out")
        self._stops = stops
        self._held = ""

    def copy(self) -> StopStrings:
        """An independent copy in the same state."""
        return copy(self)

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is final, and the stop string that ended it, or None."""
        text = self._held + text
        completed = [(start + len(stop), -len(stop), stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if completed:
            end, _, stop = min(completed)
            self._held = ""
            return text[: end - len(stop)], stop
        num_held = self._longest_beginning(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None

    def flush(self) -> str:
        """The text that was held back, once no text follows."""
        text, self._held = self._held, ""
        return text

    def _longest_beginning(self, text: str) -> int:
        """How many characters at the end of `text` are the beginning of a stop string."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(text))
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)


@dataclass(frozen=True)
class Piece:
    """What one push of tokens adds to an answer.

    text: final text.
    num_tokens_used: how many of the pushed tokens belong to the answer.
    stopped: the stop string that ended the answer; None: it goes on.
    """

    text: str
    num_tokens_used: int
    stopped: str | None = None


class TextStream:
    """Streams the text of one answer, cut at the first stop string.

    `num_tokens_used` of a piece counts the pushed tokens up to the one that completed the stop string, so that an accepted path can
    be cut inside before any of it is emitted. The cut does not depend on how many tokens come at a time.
    Stop strings are matched in the text, which has no special tokens: those are stop tokens (`stop_token_ids`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stops) if stops else None

    def copy(self) -> TextStream:
        """An independent copy in the same state."""
        clone = copy(self)
        clone._detokenizer = self._detokenizer.copy()
        clone._stops = self._stops and self._stops.copy()
        return clone

    def push(self, token_ids: Sequence[int]) -> Piece:
        """What these tokens add to the answer."""
        if self._stops is None:
            return Piece(self._detokenizer.push(token_ids), len(token_ids))
        text = ""
        for num_used, token_id in enumerate(token_ids, 1):
            final, stopped = self._stops.push(self._detokenizer.push([token_id]))
            text += final
            if stopped:
                return Piece(text, num_used, stopped)
        return Piece(text, len(token_ids))

    def flush(self) -> Piece:
        """The rest, once no token follows. Text that becomes final only now may still contain a stop string."""
        rest = self._detokenizer.flush()
        if self._stops is None:
            return Piece(rest, 0)
        text, stopped = self._stops.push(rest)
        return Piece(text if stopped else text + self._stops.flush(), 0, stopped)
