"""What trainable drafters share: their target's embedding and LM head, the state of each seat, loss and planner.

A method's own file says what its heads compute. Must not import a method.
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
from headstart.speculation.heads_plan import MachineCost
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
    """Settings of heads, one per depth.

    num_heads: number of heads; the deepest guess.
    num_layers: residual blocks per head.
    projection: "own", each head has an LM head, initialised as the target's; "shared", all use the target's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_heads: int = Field(default=4, ge=1, le=64)
    num_layers: int = Field(default=1, ge=1, le=64)
    projection: Literal["own", "shared"] = "own"


class Block(nn.Module):
    """x + SiLU(W x + b), a residual block of Medusa (Cai et al. 2024). Initially the identity: W and b are zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]"""
        return x + nn.functional.silu(self.linear(x))


class Heads(nn.Module):
    """A trainable drafter on the target's hidden states. Subclasses define `states` and `propose`.

    `bind`, or `attach` for drafting, gives it the target's embedding and LM head; nothing works before that.

    config: of type `config_type`.
    hidden, vocab: sizes of the target.

    name: of the method.
    taps: the target layers whose hidden states are read; by default the last, normed.
    joins_pretraining: whether a trunk can be pretrained with these heads.
    min_gain: kept tokens that another level must promise; see `Best`.
    memories: the KV caches of its decoders, once attached; empty where it has none.
    loss_defaults: settings of `Objective` where the run gives none.
    heads: one per depth.
    """

    name: str
    config_type: ClassVar[type[BaseModel]]
    taps: tuple[int, ...] = (-1,)
    joins_pretraining: ClassVar[bool] = False
    min_gain: ClassVar[float] = 0.0
    memories: Sequence[Memory] = ()
    loss_defaults: ClassVar[dict[str, float]] = {}
    heads: nn.ModuleList

    def __init__(self, config: Any, hidden: int, vocab: int) -> None:
        super().__init__()
        self.config = config
        self.hidden = hidden
        self.vocab = vocab
        self.calibration: Calibration = UNFITTED
        self.costs: tuple[MachineCost, ...] = ()  # of rounds with them, by machine
        self.planner: Planner = Best(nodes=10, depth=self.depth, width=4, beam=6, min_gain=self.min_gain)
        self._embed_head: EmbedHead | None = None
        self._states = torch.empty(0)  # [seats, state_width] what each seat's next draft starts from

    @classmethod
    def resolve_config(cls, config: Any, target: PreTrainedConfig) -> Any:
        """The config with everything filled in that follows from the target's configuration."""
        return config

    @property
    def state_width(self) -> int:
        """Width of the state that a seat's next draft starts from."""
        return self.hidden

    @property
    def slot_bytes(self) -> int:
        """Bytes of its own memory per slot; 0 where it has no KV cache."""
        return 0

    @property
    def depth(self) -> int:
        """The depth of the deepest guess."""
        return int(self.config.num_heads)

    @property
    def embed_head(self) -> EmbedHead:
        """The target's embedding and LM head."""
        assert self._embed_head is not None, "bind the drafter to its target first"
        return self._embed_head

    def bind(self, embed_head: EmbedHead) -> Self:
        """Use the target's embedding and LM head. Raises ValueError where the sizes differ."""
        if (self.hidden, self.vocab) != (embed_head.hidden, embed_head.vocab):
            raise ValueError(
                f"these {self.name} heads are for a hidden size of {self.hidden} and a vocabulary of {self.vocab}, the target has "
                f"{embed_head.hidden} and {embed_head.vocab}; train heads for this target, or choose the target of these"
            )
        self._embed_head = embed_head
        return self

    def choose_vocab(self, counts: Tensor, special: Sequence[int]) -> None:
        """Choose the tokens of a reduced vocabulary, before `init_from_target` and training; nothing where it is not reduced.

        counts: [vocab] int64, how often each token occurs in an assistant's text.
        special: tokens that must be in it.
        """

    def coverage(self, counts: Tensor) -> float | None:
        """Share of the tokens of the texts that are in a reduced vocabulary; None where it is not reduced. counts: [vocab]."""
        return None

    def init_from_target(self) -> Self:
        """Initialise weights from the target, before training; here, own projections as the target's LM head."""
        if self.config.projection == "own":
            for depth in range(self.depth):
                with torch.no_grad():
                    self.head(depth).projection.weight.copy_(self.embed_head.lm_head_weight)
        return self

    def clone(self) -> Self:
        """A copy, not bound, to be attached while these heads go on training."""
        weight = next(self.parameters())
        clone = type(self)(self.config, self.hidden, self.vocab).to(weight.device, weight.dtype)
        clone.load_state_dict(self.state_dict())
        clone.calibration, clone.planner = self.calibration, self.planner
        return clone

    def head(self, depth: int) -> Any:
        """The head of a depth (from 0). It has a `projection` where that is its own."""
        return self.heads[depth]

    # -- training --

    def states(self, batch: Batch) -> Iterator[HeadOutput]:
        """Yields for each depth the output at all positions, teacher-forced; its logits are those of drafting."""
        raise NotImplementedError

    def loss(self, batch: Batch, objective: Objective) -> tuple[Tensor, Metrics]:
        """The loss, a scalar summed over the positions that count, and metrics; see `headstart.drafters.parts.drafter_loss`."""
        return drafter_loss(self.states(batch), batch, objective, self.embed_head.logits)

    def parts(self, batch: Batch, objective: Objective) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the same loss in parts that share nothing except features and weights, for `backward_by_part`.

        Of each part, its loss and its columns of `Metrics.stacked`. A single part is always correct.
        """
        loss, metrics = self.loss(batch, objective)
        yield loss, metrics.stacked()

    def output_head(self, depth: int) -> OutputHead:
        """From the states of a depth (from 0) to logits, [n, hidden] -> [n, vocab]."""
        if self.config.projection == "shared":
            return OutputHead(self.embed_head.logits, self.embed_head.parameters)
        projection = self.head(depth).projection
        return OutputHead(lambda states: self.embed_head.scale_logits(projection(states)), tuple(projection.parameters()))

    # -- drafting --

    @property
    def device(self) -> torch.device:
        """Where it drafts."""
        return self._states.device

    def attach(self, target: Target, seating: Seating) -> None:
        """Bind to the target, move to its device and precision, and allocate a state per seat.

        Raises ValueError where the sizes differ, and where the target has not all layers that are read.
        """
        self.bind(target.embed_head)
        if missing := [tap for tap in self.taps if not -target.num_layers <= tap < target.num_layers]:
            raise ValueError(
                f"these {self.name} heads read layer {missing[0]}, counted from 0, and {target.name} has {target.num_layers}; use "
                "them with the model that they were made for"
            )
        self.requires_grad_(False).eval().to(target.device, target.dtype)
        target.pack_drafter(self)
        self._states = torch.zeros(seating.num_seats, self.state_width, device=target.device, dtype=target.dtype)

    @torch.inference_mode()
    def extend(self, kept: Kept) -> None:
        """Encode the kept tokens, and keep the state of each seat's last one."""
        assert kept.features is not None, "these heads read features"
        lasts = torch.tensor(kept.lengths).cumsum(0) - 1
        seats = torch.tensor([kept.seats, lasts.tolist()]).to(self.device, non_blocking=True)
        # Not in place: a snapshot refers to the tensor as it was.
        self._states = self._states.index_copy(0, seats[0], self.encode(kept)[seats[1]].to(self._states))

    def encode(self, kept: Kept) -> Tensor:
        """[kept, state_width] what a draft starts from at each kept token: its features, unless a method computes more."""
        assert kept.features is not None
        return kept.features

    def propose(self, rows: Rows) -> Drafts:
        """See `Drafter.propose`."""
        raise NotImplementedError

    def root_states(self, rows: Rows) -> Tensor:
        """[drafting rows, state_width] what the drafts of each row that drafts start from."""
        seats = [rows.seats[row] for row in rows.drafting]
        return self._states[torch.tensor(seats).to(self.device, non_blocking=True)]

    def fork(self, source: int, seat: int, length: int) -> None:
        """Does nothing: the last token of a forked prompt is scored again, which gives its state."""

    def free(self, seat: int) -> None:
        """Does nothing: the next text of a seat overwrites its state."""

    def snapshot(self) -> tuple[Tensor, list[list[int]]]:
        """The states, and the number of entries of each memory."""
        return self._states, [memory.snapshot() for memory in self.memories]

    def restore(self, snapshot: tuple[Tensor, list[list[int]]]) -> None:
        """Return to a snapshot."""
        self._states, lengths = snapshot
        for memory, entries in zip(self.memories, lengths, strict=True):
            memory.restore(entries)
