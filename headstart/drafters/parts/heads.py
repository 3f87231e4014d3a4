"""What drafters made of heads behind the target's last layer have in common: embed_head, seats, loss, and their facts.

A method's own file says what a head computes; this one what is the same for all of them. It refuses to know any method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from headstart.drafters.parts.drafter_loss import drafter_loss
from headstart.drafters.parts.losses import Batch, HeadOutput, Metrics, Objective, OutputHead
from headstart.speculation.calibration import UNFITTED, Calibration
from headstart.speculation.planner import Best, Planner
from headstart.speculation.rows import Rows
from headstart.speculation.tree import Drafts, Kept

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from headstart.drafters.parts.decoder import Memory
    from headstart.target.cache import Seating
    from headstart.target.embed_head import EmbedHead
    from headstart.target.target import Target


class HeadsConfig(BaseModel):
    """num_heads: how deep it drafts. num_layers: blocks per head. projection: a matrix to the vocabulary of each head's own, which
    starts as the target's, or the target's head shared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_heads: int = Field(default=4, ge=1, le=64)
    num_layers: int = Field(default=1, ge=1, le=64)
    projection: Literal["own", "shared"] = "own"


class Block(nn.Module):
    """x + SiLU(W x + b), a residual block of Medusa (Cai et al. 2024). Starts as the identity: W and b are zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]"""
        return x + nn.functional.silu(self.linear(x))


class Heads(nn.Module):
    """A drafter of `num_heads` heads that read the target's final, normed states; for subclasses that say what a head is.

    hidden, vocab: of the target. `bind` lends it the target's ends: nothing works before that. `attach` does so for drafting.
    """

    name: str
    config_type: ClassVar[type[BaseModel]]
    taps: tuple[int, ...] = (-1,)
    joins_pretraining: ClassVar[bool] = False  # whether a trunk may learn with them from the start
    min_gain: ClassVar[float] = 0.0  # kept tokens that another level must promise; see `Best`
    memories: Sequence[Memory] = ()  # of decoders that read whole texts, once attached
    loss_defaults: ClassVar[dict[str, float]] = {}  # what their `Objective` is, where nothing else is said
    heads: nn.ModuleList  # one per depth

    def __init__(self, config: Any, hidden: int, vocab: int) -> None:
        super().__init__()
        self.config = config
        self.hidden = hidden
        self.vocab = vocab
        self.calibration: Calibration = UNFITTED
        self.planner: Planner = Best(nodes=10, depth=self.depth, width=4, beam=6, min_gain=self.min_gain)
        self._embed_head: EmbedHead | None = None
        self._states = torch.empty(0)  # [seats, remembered] what each seat's next draft starts from

    @classmethod
    def resolve_config(cls, config: Any, target: PreTrainedConfig) -> Any:
        """The settings with everything filled in that the target's own configuration decides."""
        return config

    @property
    def state_width(self) -> int:
        """Width of what a seat's next draft starts from: a state, unless a method says otherwise."""
        return self.hidden

    @property
    def slot_bytes(self) -> int:
        """A state per seat is all; nothing per slot, unless a method says otherwise."""
        return 0

    @property
    def depth(self) -> int:
        """The deepest guess."""
        return int(self.config.num_heads)

    @property
    def embed_head(self) -> EmbedHead:
        assert self._embed_head is not None, "bind the drafter to its target first"
        return self._embed_head

    def bind(self, embed_head: EmbedHead) -> Self:
        """Borrow the target's embedding and head. Raises ValueError where the sizes differ."""
        if (self.hidden, self.vocab) != (embed_head.hidden, embed_head.vocab):
            raise ValueError(
                f"these {self.name} heads are for a hidden size of {self.hidden} and a vocabulary of {self.vocab}, the target has "
                f"{embed_head.hidden} and {embed_head.vocab}; train heads for this target, or name theirs"
            )
        self._embed_head = embed_head
        return self

    def choose_vocab(self, counts: Tensor, special: Sequence[int]) -> None:
        """Before training and before `init_from_target`: how often an assistant says each token, [vocab] int64, and which tokens
        are special.
        For those that can say some tokens only."""

    def coverage(self, counts: Tensor) -> float | None:
        """Share of these tokens, as in `choose_vocab`, that it can say; None where that is all."""
        return None

    def init_from_target(self) -> Self:
        """Before training: own projections begin as the target's head."""
        if self.config.projection == "own":
            for depth in range(self.depth):
                with torch.no_grad():
                    self.head(depth).projection.weight.copy_(self.embed_head.lm_head_weight)
        return self

    def clone(self) -> Self:
        """The same heads once more, unbound, to be attached while these go on learning."""
        weight = next(self.parameters())
        clone = type(self)(self.config, self.hidden, self.vocab).to(weight.device, weight.dtype)
        clone.load_state_dict(self.state_dict())
        clone.calibration, clone.planner = self.calibration, self.planner
        return clone

    def head(self, depth: int) -> Any:
        """The head of a depth (from 0), which has a `projection` if that is its own."""
        return self.heads[depth]

    # -- learning --

    def states(self, batch: Batch) -> Iterator[HeadOutput]:
        """Per depth what the heads say at every position, given the features and true tokens so far: the numbers of drafting."""
        raise NotImplementedError

    def loss(self, batch: Batch, objective: Objective) -> tuple[Tensor, Metrics]:
        """Summed over the positions that count, and metrics; see `headstart.drafters.parts.drafter_loss`."""
        return drafter_loss(self.states(batch), batch, objective, self.embed_head.logits)

    def parts(self, batch: Batch, objective: Objective) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the same loss in parts that share nothing but features and weights, for `backward_by_part`: each part's loss, and
        its columns of `Metrics.stacked`. One part is always right."""
        loss, metrics = self.loss(batch, objective)
        yield loss, metrics.stacked()

    def output_head(self, depth: int) -> OutputHead:
        """From a head's states to logits, [n, hidden] -> [n, vocab]; depth counts from 0."""
        if self.config.projection == "shared":
            return OutputHead(self.embed_head.logits, self.embed_head.parameters)
        own = self.head(depth).projection
        return OutputHead(lambda states: self.embed_head.scale_logits(own(states)), tuple(own.parameters()))

    # -- drafting --

    @property
    def device(self) -> torch.device:
        return self._states.device

    def attach(self, target: Target, seating: Seating) -> None:
        """Raises ValueError where the sizes differ, and for a target without the layers that are read."""
        self.bind(target.embed_head)
        if deep := [tap for tap in self.taps if not -target.num_layers <= tap < target.num_layers]:
            raise ValueError(
                f"these {self.name} heads read layer {deep[0]}, counted from 0, and {target.name} has {target.num_layers}; use "
                "them with the model that they were made for"
            )
        self.requires_grad_(False).eval().to(target.device, target.dtype)
        target.pack_drafter(self)
        self._states = torch.zeros(seating.num_seats, self.state_width, device=target.device, dtype=target.dtype)

    @torch.inference_mode()
    def extend(self, kept: Kept) -> None:
        assert kept.features is not None, "these heads read features"
        lasts = torch.tensor(kept.lengths).cumsum(0) - 1
        seats = torch.tensor([kept.seats, lasts.tolist()]).to(self.device, non_blocking=True)
        # Replaced, not written to: a snapshot holds the states as they were.
        self._states = self._states.index_copy(0, seats[0], self.encode(kept)[seats[1]].to(self._states))

    def encode(self, kept: Kept) -> Tensor:
        """What drafts start from at each kept token, [kept, remembered]: the features, unless something stands between."""
        assert kept.features is not None
        return kept.features

    def propose(self, rows: Rows) -> Drafts:
        raise NotImplementedError

    def drafting(self, rows: Rows) -> Tensor:
        """[drafting rows, remembered] of the rows that draft."""
        seats = [rows.seats[row] for row in rows.drafting]
        return self._states[torch.tensor(seats).to(self.device, non_blocking=True)]

    def fork(self, source: int, seat: int, length: int) -> None:
        """Nothing to copy: the last token of a forked prompt is scored again, and brings its state with it."""

    def free(self, seat: int) -> None:
        """A seat's state is overwritten by its next occupant."""

    def snapshot(self) -> tuple[Tensor, list[list[int]]]:
        return self._states, [memory.snapshot() for memory in self.memories]

    def restore(self, snapshot: tuple[Tensor, list[list[int]]]) -> None:
        self._states, lengths = snapshot
        for memory, entries in zip(self.memories, lengths, strict=True):
            memory.restore(entries)
