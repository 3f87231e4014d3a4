"""Multi-token prediction by modules, one after another (DeepSeek-V3, arXiv 2412.19437), the last of them used again on its own
output (FastMTP, arXiv 2509.18362).

Module k reads, for every token from the k-th on, the embedding of that token and what module k - 1 made of the one before; module
1 reads the target's final, normed states. What it says, through the target's own head, is the next token: so the first guess
behind the root costs one layer, as does each level below it. Guesses deeper than there are modules come from the last one, fed
with what it said itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from headstart.drafters.parts.decoder import Memory, decoder, norm_like, unrolled
from headstart.drafters.parts.decoder_heads import Layered
from headstart.drafters.parts.expansion import Expansion
from headstart.drafters.parts.grow import Level, grow
from headstart.drafters.parts.llama_layer import llama_block
from headstart.drafters.parts.losses import Batch, HeadOutput, next_embeddings
from headstart.speculation.rows import Rows
from headstart.speculation.tree import Drafts, Kept


class MtpConfig(BaseModel):
    """num_modules: modules of their own weights. depth: how deep it drafts; from there on the last module is used again. block:
    configuration of a module's decoder layer, as transformers has it; None for the target's own kind. hidden_first: whether the
    projection reads [state, embedding] (MiMo), not [embedding, state] (DeepSeek, GLM, Qwen)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_modules: int = Field(default=1, ge=1, le=16)
    depth: int = Field(default=4, ge=1, le=64)
    block: dict[str, Any] | None = None
    hidden_first: bool = False


class Stage(nn.Module):
    """One module: two norms, a projection, a decoder layer and its norm."""

    def __init__(self, block: dict[str, Any], hidden: int, hidden_first: bool) -> None:
        super().__init__()
        self.hidden_first = hidden_first
        self.block = decoder(block, hidden)
        self.enorm, self.hnorm = norm_like(self.block), norm_like(self.block)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)

    def layer_input(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """[..., hidden] twice -> what the layer reads, [..., hidden]."""
        parts = self.enorm(embedded), self.hnorm(hidden)
        read: Tensor = self.eh_proj(torch.cat(parts[::-1] if self.hidden_first else parts, -1))
        return read


class Mtp(Layered):
    """Drafts with sequential modules, level by level."""

    name = "mtp"
    config_type = MtpConfig

    def __init__(self, config: MtpConfig, hidden: int, vocab: int) -> None:
        config = config.model_copy(update={"block": config.block or llama_block(hidden)})
        assert config.block is not None
        super().__init__(config, hidden, vocab)
        self.stages = nn.ModuleList(Stage(config.block, hidden, config.hidden_first) for _ in range(config.num_modules))

    @property
    def depth(self) -> int:
        return int(self.config.depth)

    @property
    def decoders(self) -> Sequence[Any]:
        return [self.stage(place).block for place in range(len(self.stages))]

    def stage(self, place: int) -> Any:
        """The module that speaks `place` (from 0) levels below the root."""
        return self.stages[min(place, len(self.stages) - 1)]

    def init_from_target(self) -> Self:
        """Modules begin by handing the state on, so that they say at first what the target would."""
        with torch.no_grad():
            for stage in map(self.stage, range(len(self.stages))):
                first = 0 if self.config.hidden_first else self.hidden
                stage.eh_proj.weight[:, first : first + self.hidden] = torch.eye(self.hidden)
        return self

    # -- learning --

    def states(self, batch: Batch) -> Iterator[HeadOutput]:
        from transformers import DynamicCache

        embedded, hidden = self.embed_head.embed(batch.tokens), batch.features
        positions = torch.arange(batch.tokens.shape[1], device=hidden.device)
        cache = None
        for place in range(self.depth):
            stage, again = self.stage(place), max(0, place + 1 - len(self.stages))
            if again == 0:
                cache = DynamicCache() if place + 1 == len(self.stages) < self.depth else None
            read = stage.layer_input(hidden, next_embeddings(embedded, place + 1))
            hidden = unrolled(stage.block, read, again, positions + place + 1, cache)
            yield HeadOutput(hidden, self.output_head(place))

    # -- drafting --

    def encode(self, kept: Kept) -> Tensor:
        """[kept, modules * hidden]: what each module makes of the token after each kept one."""
        embedded, positions = self.embed_head.embed(kept.nexts), kept.positions + 1
        hidden, made = super().encode(kept), []
        shift = _Shift(kept, self.device)
        for place, memory in enumerate(self.memories):
            if place == 0:
                hidden = memory.extend(self.stage(0).layer_input(hidden, embedded), positions, kept.seats, kept.lengths)
            else:
                before = self._states[shift.seats, (place - 1) * self.hidden : place * self.hidden]
                hidden = shift.extend(place, memory, self.stage(place), hidden, before, embedded, positions)
            made.append(hidden)
        return torch.cat(made, -1)

    @torch.inference_mode()
    def propose(self, rows: Rows) -> Drafts:
        expansion = _Expansion(self, rows)
        return grow(rows, expansion.logits(), expansion.expand, calibration=self.calibration, deepest=self.depth)

    def fork(self, source: int, seat: int, length: int) -> None:
        """Behind a fork from the middle of a text, modules after the first begin without the state before it."""
        whole = self.memories[0].length(source) == length
        states = self._states.clone()  # a snapshot may hold them as they are
        states[seat] = states[source] if whole else 0
        self._states = states
        for place, memory in enumerate(self.memories):
            memory.fork(source, seat, max(0, length - place))


class _Shift:
    """What modules after the first read: what the one before made of the token before. A text's first token has none."""

    def __init__(self, kept: Kept, device: torch.device) -> None:
        lengths = kept.lengths
        ends = [sum(lengths[: row + 1]) for row in range(len(lengths))]
        self.kept = kept
        self.firsts = [end - length for end, length in zip(ends, lengths, strict=True)]
        self.seats = torch.tensor(kept.seats).to(device, non_blocking=True)
        self.at = torch.tensor(self.firsts).to(device, non_blocking=True)

    def extend(
        self, place: int, memory: Memory, stage: Any, made: Tensor, before: Tensor, embedded: Tensor, positions: Tensor
    ) -> Tensor:
        """Module `place` reads on. made: [kept, hidden] by the module before it; before: [rows, hidden] what that made of the
        last token of each row's text so far. Returns [kept, hidden], zero where there is nothing to read."""
        hidden = made.roll(1, 0)
        hidden[self.at] = before
        read = stage.layer_input(hidden, embedded)
        # Module `place` has nothing to read for the first `place` tokens after a text's first.
        skipped = [min(length, max(0, place - start)) for start, length in zip(self.kept.starts, self.kept.lengths, strict=True)]
        if not any(skipped):
            return memory.extend(read, positions, self.kept.seats, self.kept.lengths)
        lengths = [length - skip for length, skip in zip(self.kept.lengths, skipped, strict=True)]
        spans = zip(self.firsts, skipped, lengths, strict=True)
        places = torch.tensor([at for first, skip, length in spans for at in range(first + skip, first + skip + length)])
        places = places.to(made.device, non_blocking=True).long()
        rows = [row for row, length in enumerate(lengths) if length]
        states = torch.zeros_like(made)
        if rows:
            seats = [self.kept.seats[row] for row in rows]
            states[places] = memory.extend(read[places], positions[places], seats, [lengths[row] for row in rows])
        return states


class _Expansion(Expansion):
    """One round. states: what each module made of the last level's nodes, from module `min(depth, last)` on: no deeper level
    reads those before."""

    def __init__(self, mtp: Mtp, rows: Rows) -> None:
        super().__init__(rows, mtp.root_states(rows)[:, None].split(mtp.hidden, -1))
        self.mtp = mtp
        self.last = len(mtp.stages) - 1

    def logits(self) -> Tensor:
        logits: Tensor = self.mtp.embed_head.logits(self.states[0].flatten(0, 1))
        return logits

    def run(self, level: Level, parents: Sequence[Tensor]) -> Sequence[Tensor]:
        """Each module reads what the one before it made of the parent; the last one, below them all, what it made itself."""
        embedded = self.mtp.embed_head.embed(level.tokens)
        modules = range(min(self.depth, self.last), self.last + 1)
        inputs = [self.mtp.stage(module).layer_input(states, embedded) for module, states in zip(modules, parents, strict=False)]
        positions = self.positions(level, self.mtp.memories[0], offset=1)
        return [self.read(level, self.mtp.memories[module], one, positions) for module, one in zip(modules, inputs, strict=True)]
