"""Multi-token prediction with sequential modules (DeepSeek-V3, arXiv 2412.19437, section 2.2); deeper guesses come from the last
module, which reads its own states (FastMTP, arXiv 2509.18362).

Module m (from 0) reads the embedding of a token and the state that module m - 1 has of the token before; module 0 reads the
target's last hidden states. Through the target's LM head, each predicts the next token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from headstart.drafters.parts.compiled_level import CompiledLevel
from headstart.drafters.parts.decoder import Memory, decoder, norm_like, unrolled
from headstart.drafters.parts.decoder_heads import DecoderHeads
from headstart.drafters.parts.expansion import Expansion
from headstart.drafters.parts.grow import Level, grow
from headstart.drafters.parts.llama_layer import llama_block
from headstart.drafters.parts.losses import Batch, HeadOutput, next_embeddings
from headstart.speculation.rows import Rows
from headstart.speculation.tree import Drafts, Kept
from headstart.target.steps import Steps, UnsupportedError


class MtpConfig(BaseModel):
    """Settings of MTP modules.

    num_modules: number of modules, each with its own weights.
    depth: the deepest guess; guesses deeper than `num_modules` come from the last module.
    block: configuration of a module's decoder layer, as transformers has it; None: a layer like the target's last one.
    hidden_first: the projection reads [state, embedding] (MiMo); False: [embedding, state] (DeepSeek, GLM, Qwen).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_modules: int = Field(default=1, ge=1, le=16)
    depth: int = Field(default=4, ge=1, le=64)
    block: dict[str, Any] | None = None
    hidden_first: bool = False


class Stage(nn.Module):
    """One MTP module: two norms, a projection, a decoder layer and its norm."""

    def __init__(self, block: dict[str, Any], hidden: int, hidden_first: bool) -> None:
        super().__init__()
        self.hidden_first = hidden_first
        self.block = decoder(block, hidden)
        self.enorm, self.hnorm = norm_like(self.block), norm_like(self.block)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)

    def layer_input(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """The decoder layer's input, from states and embeddings: [..., hidden] twice -> [..., hidden]."""
        parts = self.enorm(embedded), self.hnorm(hidden)
        projected: Tensor = self.eh_proj(torch.cat(parts[::-1] if self.hidden_first else parts, -1))
        return projected


class Mtp(DecoderHeads):
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
        return [self.stage(module).block for module in range(len(self.stages))]

    def stage(self, depth: int) -> Any:
        """The module that guesses the token of a depth (from 0)."""
        return self.stages[min(depth, len(self.stages) - 1)]

    def init_from_target(self) -> Self:
        """Initialise the projections so that they pass the state on: the first guesses are then close to the target's."""
        with torch.no_grad():
            for stage in map(self.stage, range(len(self.stages))):
                first = 0 if self.config.hidden_first else self.hidden
                stage.eh_proj.weight[:, first : first + self.hidden] = torch.eye(self.hidden)
        return self

    # -- training --

    def states(self, batch: Batch) -> Iterator[HeadOutput]:
        from transformers import DynamicCache

        embedded, hidden = self.embed_head.embed(batch.tokens), batch.features
        positions = torch.arange(batch.tokens.shape[1], device=hidden.device)
        cache = None
        for depth in range(self.depth):
            stage, step = self.stage(depth), max(0, depth + 1 - len(self.stages))  # steps of the last module on its own states
            if step == 0:
                cache = DynamicCache() if depth + 1 == len(self.stages) < self.depth else None
            inputs = stage.layer_input(hidden, next_embeddings(embedded, depth + 1))
            hidden = unrolled(stage.block, inputs, step, positions + depth + 1, cache)
            yield HeadOutput(hidden, self.output_head(depth))

    # -- drafting --

    def encode(self, kept: Kept) -> Tensor:
        """[kept, modules * hidden] each module's state of the token after each kept one."""
        embedded, positions = self.embed_head.embed(kept.nexts), kept.positions + 1
        hidden, states = super().encode(kept), []
        shift = _Shift(kept, self.device)
        for module, memory in enumerate(self.memories):
            if module == 0:
                hidden = memory.extend(self.stage(0).layer_input(hidden, embedded), positions, kept.seats, kept.lengths)
            else:
                before = self._states[shift.seats, (module - 1) * self.hidden : module * self.hidden]
                hidden = shift.extend(module, memory, self.stage(module), hidden, before, embedded, positions)
            states.append(hidden)
        return torch.cat(states, -1)

    def make_compiled_level(self) -> CompiledLevel:
        if len(self.stages) > 1:
            raise UnsupportedError
        head = self.embed_head
        return CompiledLevel(self.memories[0], head.embedding, self._record, self.hidden, head.scale_logits, offset=1)

    def _record(self, steps: Steps, states: int, embedded: int) -> tuple[int, int]:
        stage = self.stage(0)
        parts = steps.norm(stage.enorm, embedded), steps.norm(stage.hnorm, states)
        inputs = steps.linear(stage.eh_proj, steps.join(*(parts[::-1] if stage.hidden_first else parts)))
        hidden = self.memories[0].record(steps, [inputs])
        return hidden, steps.linear(self.embed_head.lm_head, hidden)

    @torch.inference_mode()
    def propose(self, rows: Rows) -> Drafts:
        expansion = _Expansion(self, rows)
        return grow(rows, expansion.logits(), expansion.expand, calibration=self.calibration, deepest=self.depth)

    def fork(self, source: int, seat: int, length: int) -> None:
        """Copy entries and state; after a fork in the middle of a text, modules after the first start from a state of zeros."""
        is_at_end = self.memories[0].length(source) == length
        states = self._states.clone()  # not in place: a snapshot refers to the tensor as it was
        states[seat] = states[source] if is_at_end else 0
        self._states = states
        for module, memory in enumerate(self.memories):
            memory.fork(source, seat, max(0, length - module))


class _Shift:
    """The inputs of the modules after the first, for kept tokens: the states of the module before, one token to the right.

    Module m (from 0) has no input for the first m tokens after a text's first.
    """

    def __init__(self, kept: Kept, device: torch.device) -> None:
        lengths = kept.lengths
        ends = [sum(lengths[: row + 1]) for row in range(len(lengths))]
        self.kept = kept
        self.offsets = [end - length for end, length in zip(ends, lengths, strict=True)]
        self.seats = torch.tensor(kept.seats).to(device, non_blocking=True)
        self.offset_indices = torch.tensor(self.offsets).to(device, non_blocking=True)

    def extend(
        self, module: int, memory: Memory, stage: Any, states: Tensor, before: Tensor, embedded: Tensor, positions: Tensor
    ) -> Tensor:
        """Run one module over the kept tokens. Returns its states, [kept, hidden], zero where it has no input.

        memory, stage: of the module.
        states: [kept, hidden] of the module before.
        before: [rows, hidden] that module's state of each row's last token before the kept ones.
        embedded: [kept, hidden] of the tokens after the kept ones; positions: [kept] of these.
        """
        hidden = states.roll(1, 0)
        hidden[self.offset_indices] = before
        inputs = stage.layer_input(hidden, embedded)
        skipped = [min(length, max(0, module - start)) for start, length in zip(self.kept.starts, self.kept.lengths, strict=True)]
        if not any(skipped):
            return memory.extend(inputs, positions, self.kept.seats, self.kept.lengths)
        lengths = [length - skip for length, skip in zip(self.kept.lengths, skipped, strict=True)]
        spans = zip(self.offsets, skipped, lengths, strict=True)
        kept_indices = [index for offset, skip, length in spans for index in range(offset + skip, offset + skip + length)]
        indices = torch.tensor(kept_indices).to(states.device, non_blocking=True).long()
        rows = [row for row, length in enumerate(lengths) if length]
        result = torch.zeros_like(states)
        if rows:
            seats = [self.kept.seats[row] for row in rows]
            result[indices] = memory.extend(inputs[indices], positions[indices], seats, [lengths[row] for row in rows])
        return result


class _Expansion(Expansion):
    """One round. states: one tensor for each module from `min(depth, last)` on; no deeper level reads those of earlier modules."""

    def __init__(self, mtp: Mtp, rows: Rows) -> None:
        super().__init__(rows, mtp.root_states(rows)[:, None].split(mtp.hidden, -1), mtp.compiled_level)
        self.mtp = mtp
        self.last = len(mtp.stages) - 1

    def logits(self) -> Tensor:
        logits: Tensor = self.mtp.embed_head.logits(self.states[0].flatten(0, 1))
        return logits

    def run(self, level: Level, parents: Sequence[Tensor]) -> Sequence[Tensor]:
        # Each module reads the parent's state of the module before it; deeper than there are modules, the last one reads its own.
        embedded = self.mtp.embed_head.embed(level.tokens)
        modules = range(min(self.depth, self.last), self.last + 1)
        inputs = [self.mtp.stage(module).layer_input(states, embedded) for module, states in zip(modules, parents, strict=False)]
        positions = self.positions(level, self.mtp.memories[0], offset=1)
        return [
            self.read(level, self.mtp.memories[module], module_inputs, positions)
            for module, module_inputs in zip(modules, inputs, strict=True)
        ]
