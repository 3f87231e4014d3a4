"""Published EAGLE-3 heads whose files are understood: fitted to their target, checked, and read into a drafter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from headstart.formats.draft_vocab import first_difference, ids_from_offsets, offsets_error
from headstart.formats.published.eagle import EagleHead, Unprefixed
from headstart.formats.published.taps import Convention, checked, taps_of

if TYPE_CHECKING:
    from headstart.formats.target_info import TargetInfo
    from headstart.target.embed_head import EmbedHead

HEAD = "lm_head.weight"
OFFSETS, KEPT = "d2t", "t2d"


@dataclass(frozen=True, eq=False, kw_only=True)
class Eagle3Head(EagleHead):
    """Published EAGLE-3 heads.

    count: number of the target's layers that they read.
    numbers: these layers as their configuration counts them; None: it gives none.
    convention: whether a number is known to mean the input or the output of its layer; None: it is not known.
    is_resolved: whether `settings` holds the layers as outputs counted from 0.
    head: the target's LM head [vocab, hidden], where they use it.
    """

    count: int = 0
    numbers: tuple[int, ...] | None = None
    convention: Convention | None = None
    is_resolved: bool = False
    head: Tensor | None = None

    def problems(self, target_config: Any = None) -> Iterator[str]:
        """What prevents importing them, one sentence each; the draft vocabulary is checked last."""
        problems = [*super().problems(target_config)]
        yield from problems
        if not problems and (error := self._vocab_error()):
            yield error

    def for_target(
        self, target_info: TargetInfo, embed_head: Callable[[], EmbedHead] | None = None, taps: Sequence[int] = ()
    ) -> Self:
        """The heads with their layers as outputs counted from 0, and with the target's LM head where they have none.

        Raises ValueError where the layers that they read cannot be determined.
        """
        if self.refused or (self.is_resolved and not taps):
            return self
        self.check_sizes(target_info)
        try:
            resolved = self._taps(target_info.layers, taps)
        except ValueError as error:
            raise self.error(str(error)) from None
        heads = replace(self, settings={**self.settings, "taps": resolved}, vocab=self.vocab or target_info.vocab, is_resolved=True)
        if self.names[HEAD] is None and embed_head is not None:
            of_target = embed_head()
            heads = replace(heads, head=of_target.lm_head_weight * of_target.scale)
        return super(Eagle3Head, heads).for_target(target_info, embed_head)

    def _taps(self, num_layers: int, taps: Sequence[int]) -> tuple[int, ...]:
        if taps:
            return checked(taps, self.count, num_layers)
        return taps_of(self.numbers, self.count, num_layers, self.convention)

    def _tensor(self, name: str, like: Tensor) -> Tensor:
        if name == "ids":
            return self._ids().sort().values
        if name != HEAD:
            return super()._tensor(name, like)
        if self.names[HEAD] is None:
            if self.head is None:
                raise self.error(f"{HEAD} is missing, and the target's own is not available")
            return self.head
        rows = self._floats(str(self.names[HEAD]))
        return rows if self.offsets is None else rows[self._ids().argsort()]  # in the order of the target's ids

    @property
    def offsets(self) -> str | None:
        """The name of `d2t` in the files; None where they have none."""
        return Unprefixed(self.weights).full.get(OFFSETS)

    def _ids(self) -> Tensor:
        """Ids of the draft vocabulary in the target, [draft vocab] int64, in the order of the files."""
        return ids_from_offsets(self.weights[str(self.offsets)])

    def _vocab_error(self) -> str | None:
        """What is wrong with `d2t` and `t2d`, or None."""
        if self.offsets is None:
            return None
        if error := offsets_error(self.offsets, self.weights[self.offsets], self.vocab):
            return error
        is_reduced = self.settings["draft_vocab"] is not None  # with all tokens, the mask is not used
        mask = Unprefixed(self.weights).full.get(KEPT) if is_reduced else None
        token = None if mask is None else first_difference(self._ids(), self.weights[mask])
        return None if token is None else f"{self.offsets} and {mask} do not agree on whether token {token} can be drafted"
