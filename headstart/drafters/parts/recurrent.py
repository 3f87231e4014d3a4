"""What EAGLE and EAGLE-3 share: one decoder that reads its own output. Must not import a method.

The decoder reads pairs: a state, and the embedding of the token behind it. On known text the states are the target's; from the
first guess on they are the decoder's own. The pair with the state of token i has position i. Subclasses define the layer input and
the output head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from headstart.drafters.parts.compiled_level import CompiledLevel
from headstart.drafters.parts.decoder import unrolled
from headstart.drafters.parts.decoder_heads import DecoderHeads
from headstart.drafters.parts.expansion import Expansion
from headstart.drafters.parts.grow import Level, grow
from headstart.drafters.parts.llama_layer import llama_block, llama_block_of
from headstart.drafters.parts.losses import Batch, HeadOutput, next_embeddings
from headstart.speculation.rows import Rows
from headstart.speculation.tree import Drafts, Kept
from headstart.target.steps import Steps, UnsupportedError


class RecurrentConfig(BaseModel):
    """Settings of a drafter that reads its own output.

    depth: the deepest guess.
    steps: training steps that the decoder is unrolled on its own output; drafting may go deeper.
    block: configuration of the decoder's layers, as transformers has it; None: one Llama layer with the sizes of the target's.
    context: positions that the decoder can read; None: no limit.
    embedding: the target's, or one of its own, which does not learn.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    depth: int = Field(default=5, ge=1, le=64)
    steps: int = Field(default=1, ge=1, le=64)
    block: dict[str, Any] | None = None
    context: int | None = Field(default=None, ge=1)
    embedding: Literal["shared", "own"] = "shared"


class Recurrent(DecoderHeads):
    """Drafts level by level with one decoder.

    Raises ValueError where the block's hidden size is not that of a shared embedding.
    """

    joins_pretraining = False
    block: Any  # the decoder
    ids: Tensor | None  # [draft vocab] ascending target ids, where the vocabulary is reduced

    def __init__(self, config: Any, hidden: int, vocab: int) -> None:
        config = config.model_copy(update={"block": config.block or llama_block(hidden)})
        super().__init__(config, hidden, vocab)
        self.width = int(config.block["hidden_size"])  # of the decoder's states
        if self.width != hidden and config.embedding == "shared":
            raise ValueError(
                f"the drafter's layer has a hidden size of {self.width}, the target and its embedding, which it reads, one of "
                f"{hidden}; give the block that size"
            )
        self.register_buffer("ids", None)
        if config.embedding == "own":
            self.embedding = nn.Embedding(vocab, self.width).requires_grad_(False)

    @classmethod
    def resolve_config(cls, config: Any, target: Any) -> Any:
        return config if config.block else config.model_copy(update={"block": llama_block_of(target)})

    @property
    def depth(self) -> int:
        return int(self.config.depth)

    @property
    def decoders(self) -> Sequence[Any]:
        return [self.block]

    @property
    def state_width(self) -> int:
        return self.width

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings of tokens: [...] int64 -> [..., width]."""
        embedded: Tensor = self.embed_head.embed(tokens) if self.config.embedding == "shared" else self.embedding(tokens)
        return embedded

    def project_taps(self, features: Tensor) -> Tensor:
        """The states of known tokens, from the target's features: [..., taps * hidden] -> [..., width]."""
        return features

    def layer_input(self, states: Tensor, embedded: Tensor) -> Tensor:
        """The decoder's input for pairs: [..., width] twice -> [..., input width]."""
        raise NotImplementedError

    def next_state(self, states: Tensor) -> Tensor:
        """The state of the next pair, from the decoder's output: [..., width] -> [..., width]."""
        return states

    def init_from_target(self) -> Self:
        """Initialise an embedding of its own as the target's. Raises ValueError where their widths differ."""
        if self.config.embedding == "own":
            if self.width != self.hidden:
                raise ValueError(
                    f"an embedding {self.width} wide cannot begin as the target's of {self.hidden}; give the block that hidden "
                    "size, or start from heads that have an embedding"
                )
            with torch.no_grad():
                self.embedding.weight.copy_(self.embed_head.embed_weight)
        return self

    # -- training --

    def states(self, batch: Batch) -> Iterator[HeadOutput]:
        """The output of each unrolled step (training-time test, arXiv 2503.01840): `steps` in training, else `depth`."""
        from transformers import DynamicCache

        count = min(self.config.steps, self.depth) if self.training else self.depth
        cache = DynamicCache() if count > 1 else None
        embedded, states = self.embed(batch.tokens), self.project_taps(batch.features)
        positions = torch.arange(batch.tokens.shape[1], device=states.device)
        for step in range(count):
            inputs = self.layer_input(states, next_embeddings(embedded, step + 1))
            states = self.next_state(unrolled(self.block, inputs, step, positions + step, cache))
            yield HeadOutput(states, self.output_head(step))

    # -- drafting --

    def encode(self, kept: Kept) -> Tensor:
        states = self.project_taps(super().encode(kept))
        inputs = self.layer_input(states, self.embed(kept.nexts))
        return self.next_state(self.memories[0].extend(inputs, kept.positions, kept.seats, kept.lengths))

    def make_compiled_level(self) -> CompiledLevel:
        is_shared, head = self.config.embedding == "shared", self.embed_head
        embedding = head.embedding if is_shared else self.embedding
        return CompiledLevel(self.memories[0], embedding, self._record, self.width, self.finish_logits, offset=0)

    def _record(self, steps: Steps, states: int, embedded: int) -> tuple[int, int]:
        return self.record_output(steps, self.memories[0].record(steps, self.record_input(steps, states, embedded)))

    def record_input(self, steps: Steps, states: int, embedded: int) -> Sequence[int]:
        """As `layer_input`, as steps; a decoder with a `Wide` layer takes embeddings and states one by one."""
        raise UnsupportedError

    def record_output(self, steps: Steps, states: int) -> tuple[int, int]:
        """As `next_state` and the output head, as steps: the states and the logits before `finish_logits`."""
        return states, steps.linear(self.embed_head.lm_head, states)

    def finish_logits(self, logits: Tensor) -> Tensor:
        """From the output head's product to logits."""
        return self.embed_head.scale_logits(logits)

    @torch.inference_mode()
    def propose(self, rows: Rows) -> Drafts:
        rows = self._within_context(rows)
        if not rows.drafting:
            return Drafts.none(self.device)
        expansion = _Expansion(self, rows)
        return grow(rows, expansion.logits(), expansion.expand, self.ids, calibration=self.calibration, deepest=self.depth)

    def _within_context(self, rows: Rows) -> Rows:
        """The same rows, with depths that keep within `context`. The decoder does not read the deepest guess."""
        if (most := self.config.context) is None:
            return rows
        left = [1 + most - self.memories[0].length(seat) for seat in rows.seats]
        return replace(rows, depths=tuple(max(0, min(pair)) for pair in zip(rows.depths, left, strict=True)))

    def fork(self, source: int, seat: int, length: int) -> None:
        self.memories[0].fork(source, seat, length)


class _Expansion(Expansion):
    """One round. states: one tensor, the decoder's states of the nodes."""

    def __init__(self, drafter: Recurrent, rows: Rows) -> None:
        super().__init__(rows, [drafter.root_states(rows)[:, None]], drafter.compiled_level)
        self.drafter = drafter

    def logits(self) -> Tensor:
        return self.drafter.output_head(self.depth)(self.states[0].flatten(0, 1))

    def run(self, level: Level, parents: Sequence[Tensor]) -> Sequence[Tensor]:
        inputs = self.drafter.layer_input(parents[0], self.drafter.embed(level.tokens))
        memory = self.drafter.memories[0]
        return [self.drafter.next_state(self.read(level, memory, inputs, self.positions(level, memory)))]
