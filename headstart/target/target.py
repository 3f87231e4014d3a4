"""The target: any causal LM of transformers, which scores a forest in one forward.

Only public interfaces of transformers are used: the model's own forward, `position_ids`, `logits_to_keep`,
`output_hidden_states`, a registered attention function and a keyword that is passed on to it.
This module must not import drafters or the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from headstart.speculation.choosing import Chooser
from headstart.speculation.tree import Forest
from headstart.target import attention
from headstart.target.attention import AttentionMetadata, Kernel, Probe, RowsKernel
from headstart.target.cache import KVCache, LayerShape, Seating
from headstart.target.config import context_length, require_two_tokens, window_of_layer
from headstart.target.embed_head import EmbedHead
from headstart.target.flat_mask import FlatMask
from headstart.target.flat_rows import FlatRows, ForestRows
from headstart.target.graphs import FlatRunner
from headstart.target.held_model import HeldModel
from headstart.target.hidden_states import logits_and_features
from headstart.target.kernels import library
from headstart.target.kernels.attention import wide
from headstart.target.kernels.choice import KernelChoice, choose_kernels, inexact, ungroup
from headstart.target.kernels.choosing import choose
from headstart.target.kernels.fuse import fuse
from headstart.target.kernels.fused_attention import fuse_attention
from headstart.target.kernels.linear import prepack
from headstart.target.kernels.restore import restore
from headstart.target.loading import keep_digest, load_model
from headstart.target.probing import probe_layers
from headstart.target.row_mask import RowMask, row_masks
from headstart.target.selfcheck import holds_to_the_bit, self_check

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# model -> (dtype, kernel, threads) -> whether it is exact to the bit; only for models whose weights a target leaves as they are
_KNOWN_EXACT: WeakKeyDictionary[nn.Module, dict[tuple[torch.dtype, Kernel | RowsKernel, int], bool]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Scored:
    """The result of scoring a forest.

    logits: [asked, vocab] of the asked nodes.
    features: [nodes, taps * hidden] hidden states of all nodes after the tapped layers, side by side; None without taps.
    """

    logits: Tensor
    features: Tensor | None


class Target:
    """A causal LM that scores forests. Wrap a model that is in memory, or `load` one from a folder or the hub.

    The model is put in evaluation mode, and runs with this package's attention function only while this target runs it: its own
    `generate` works as before. `release` gives the model back as it was.

    model: the model.
    kernel: the attention kernel; `choose_kernels` replaces it.
    check: whether to run `check` now.
    Raises ValueError, naming the model and the reason, if it cannot be served exactly; then the model is left as it was.

    Attributes:
    name: where the model comes from, a path or hub id, or its class.
    num_layers, hidden, vocab, heads: number of layers, width of hidden states, width of logits, number of query heads.
    context: longest text that is scored exactly, in tokens.
    shapes: what each layer stores per token in the KV cache.
    windows: how far back each layer attends.
    kernel, min_nodes, is_exact: as in `KernelChoice`; torch's attention, 1 and False before `choose_kernels`.
    kernel_choice: what `choose_kernels` chose; None before.
    weights: "stored", or "int8" where `choose_kernels` has rounded them.
    pad_rows: whether all rows go into one attention call, for devices where a call costs more than the padding.
    flat_runner: how forwards run with `pad_rows`: their attention kernel, and whether they are captured as graphs.
    trust_remote_code: whether Python files beside the weights, or beside a draft model's, may run.
    """

    def __init__(
        self, model: PreTrainedModel, *, kernel: Kernel | RowsKernel = attention.torch_attention, check: bool = True
    ) -> None:
        self.model: PreTrainedModel = model
        self.kernel = kernel
        self.pad_rows = model.device.type != "cpu"
        self.flat_runner = FlatRunner()
        self.min_nodes = 1
        self.trust_remote_code = False
        self.is_exact = False
        self.weights = "stored"
        self.kernel_choice: KernelChoice | None = None
        text = model.config.get_text_config()
        self.name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        self.num_layers = int(text.num_hidden_layers)
        self.hidden = int(text.hidden_size)
        require_two_tokens(getattr(text, "max_position_embeddings", None), self.name)
        try:
            self._held = HeldModel.hold(model, self)
        except ValueError as error:
            raise ValueError(f"{self.name} ({type(model).__name__}) does not allow another attention function: {error}") from None
        try:
            self._examine(check)
        except BaseException:
            self.release()
            raise

    def _examine(self, check: bool) -> None:
        text = self.model.config.get_text_config()
        probe, self.vocab = probe_layers(self)
        self.context = context_length(text, self.name)
        self.shapes = tuple(LayerShape(*probe.shapes[layer]) for layer in range(self.num_layers))
        self.heads = max(probe.heads.values())
        self.windows = tuple(window_of_layer(text, layer, probe.windows[layer]) for layer in range(self.num_layers))
        if check:
            self.check()

    @classmethod
    def load(
        cls, path: str | Path, dtype: str | torch.dtype = "auto", device: str = "auto", exact: bool | str = "auto",
        trust_remote_code: bool = False, weights: str = "stored",
    ) -> Target:  # fmt: skip
        """A target from a folder or hub id, with kernels for this machine, checked.

        dtype: of the weights; "auto": as stored.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:NUMBER".
        exact: as for `choose_kernels`.
        trust_remote_code: whether Python files in that folder, and in that of a draft model for it, may run.
        weights: "stored", or "int8": rounded, with one factor per output; for bf16 on a CPU with compiled kernels. Then `release`
            gives the model back with rounded weights.
        Raises ValueError, in one sentence, for a model that cannot be loaded or served exactly.
        """
        target = cls(load_model(path, dtype, device, trust_remote_code), check=False)
        target.trust_remote_code = trust_remote_code
        target.choose_kernels(exact, weights=weights)
        target.check()
        return target

    def choose_kernels(self, exact: bool | str = "auto", *, pack: bool = True, weights: str = "stored") -> None:
        """Choose kernels for this machine.

        The choice depends on the model, the machine and, without compiled kernels, torch's number of threads, to be set
        before; never on measured times. `kernel_choice.why_not` says what prevents exactness.

        exact: True: equality to the bit; "auto": equality to the bit where a CPU has it; False: the fastest kernels.
        pack: whether the model's linears are packed in place, until `release` puts them back.
        weights: as for `load`.
        Raises ValueError where exact is True and equality to the bit is not available.
        """
        if exact not in (True, False, "auto"):
            raise ValueError(f"exact is {exact!r}; it must be True, False or 'auto'")
        if weights not in ("stored", "int8"):
            raise ValueError(f"weights is {weights!r}; it must be 'stored' or 'int8'")
        if weights == "int8":
            keep_digest(self.model)
        self._ungroup()
        self.weights = weights
        choice = choose_kernels(self.model, self.heads, self.shapes, exact, pack, weights)
        self._use(choice)
        if not choice.is_exact or self._holds_to_the_bit(is_cached=not pack):
            return
        self._use(replace(choice, kernel=wide))
        if choice.kernel is wide or not self._holds_to_the_bit(is_cached=not pack):
            self._ungroup()
            self._use(inexact(exact, "in some layer, a node of a tree gets other bits than the same node alone"))

    def _holds_to_the_bit(self, is_cached: bool) -> bool:
        """Whether the whole model is exact to the bit. is_cached: computed once per model, for callers that wrap it repeatedly."""
        known = _KNOWN_EXACT.setdefault(self.model, {}) if is_cached else {}
        key = (self.dtype, self.kernel, torch.get_num_threads())
        if key not in known:
            known[key] = holds_to_the_bit(self)
        return known[key]

    def _ungroup(self) -> None:
        if self.kernel_choice is not None:
            ungroup(self.kernel_choice)

    def _use(self, kernel_choice: KernelChoice) -> None:
        self.kernel_choice = kernel_choice
        self.kernel, self.min_nodes, self.is_exact = kernel_choice.kernel, kernel_choice.min_nodes, kernel_choice.is_exact

    # -- description --

    def __repr__(self) -> str:
        why_not = self.kernel_choice.why_not if self.kernel_choice else "its kernels were not chosen, see `choose_kernels`"
        promise = "exact to the bit" if self.is_exact else f"exact up to near ties: {why_not}"
        kernels = f", {self.instructions} kernels" if self.instructions else ""
        return f"Target({self.name!r}, {str(self.dtype).removeprefix('torch.')} on {self.device}{kernels}, {promise})"

    @property
    def instructions(self) -> str | None:
        """The processor's instructions that the compiled kernels use, such as "amx"; None with torch's kernels."""
        return self.kernel_choice.instructions if self.kernel_choice else None

    @property
    def device(self) -> torch.device:
        """The model's device."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token in the KV cache: keys and values of all layers."""
        return sum(shape.slot_bytes(self.dtype) for shape in self.shapes)

    @property
    def chooser(self) -> Chooser | None:
        """A fast choice of drafters' children, where the target runs with compiled kernels; None: torch's operations are used."""
        return choose if self.instructions else None

    @property
    def runner(self) -> FlatRunner | None:
        """What runs forwards with all rows in one attention call, for a drafter's decoders too; None: row by row."""
        return self.flat_runner if self.pad_rows else None

    def new_cache(self, seating: Seating) -> KVCache:
        """An empty KV cache for these seats. Raises ValueError where the device has no room for it."""
        return KVCache(self.shapes, seating, self.device, self.dtype, has_sink=self.pad_rows)

    @cached_property
    def embed_head(self) -> EmbedHead:
        """The model's embedding and LM head, for drafters that use them. Raises ValueError as `EmbedHead` does."""
        return EmbedHead(self.model)

    def pack_drafter(self, drafter: nn.Module) -> None:
        """Pack and fuse the modules of a drafter in place, for good, where the target runs with this machine's CPU kernels."""
        if self.kernel_choice is not None and self.device.type == "cpu":
            fuse(drafter)
            prepack(drafter)
            fuse_attention(drafter)

    def working(self) -> AbstractContextManager[None]:
        """The context in which a round runs, see `Library.working`. `forward` enters it too."""
        is_compiled = self.kernel_choice is not None and self.kernel_choice.is_compiled
        return library.working() if is_compiled else nullcontext()

    # -- scoring --

    def score(self, forest: Forest, cache: KVCache, seats: Sequence[int], taps: Sequence[int] = ()) -> Scored:
        """One forward over a forest: logits of the asked nodes, and hidden states of all nodes after the tapped layers.

        The keys and values of the nodes are written behind what each seat holds; `KVCache.commit` keeps some of them.

        seats: the seat of each row.
        taps: layers whose output is wanted; 0 is the first, -1 the last, whose output has the final norm applied.
        """
        rows = ForestRows.of_forest(forest, cache, seats) if self.pad_rows else row_masks(forest, cache, seats)
        return self.forward(forest.tokens, forest.positions, rows, cache, forest.asked, taps)

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor, positions: Tensor, rows: Sequence[RowMask] | FlatRows, cache: KVCache, asked: Tensor,
        taps: Sequence[int] = (),
    ) -> Scored:  # fmt: skip
        """The forward underneath `score`, also for drafters that grow a tree level by level in their own KV cache.

        tokens, positions: [nodes] int64.
        rows: the attention mask of each row, or with `pad_rows` the rows as tensors.
        asked: [asked] int64, indices of the nodes whose logits are returned.
        Raises ValueError after `release`.
        """
        if self not in self._held:
            raise ValueError(f"{self.name} was released and no longer attends as a target; make a new Target of it")
        layers = tuple(tap % self.num_layers for tap in taps)
        inputs = {"tokens": tokens, "text_positions": positions, "asked": asked}

        def run(inputs: Mapping[str, Tensor], flat: FlatMask | None, masks: Sequence[RowMask] = ()) -> tuple[Tensor, ...]:
            metadata = AttentionMetadata(masks, cache, self.kernel, self.windows, flat, self.flat_runner.kernel)
            return logits_and_features(self.model, layers, inputs["tokens"], inputs["text_positions"], inputs["asked"], metadata)

        with self.working(), self._held.attending():
            if isinstance(rows, FlatRows):
                sizes = (len(asked), len(tokens))[: 1 + bool(layers)]
                results = self.flat_runner.run((id(self), layers), cache, rows, inputs, run, sizes)
            else:
                results = run(inputs, None, rows)
        return Scored(results[0], results[1] if layers else None)

    # -- the model itself --

    def release(self) -> PreTrainedModel:
        """Give the model back; this target can no longer score.

        When no other target holds the model, the linears, norms and MLPs that `choose_kernels` replaced are put back with the
        same bits, and modules that were in training mode return to it. A second call does nothing.
        """
        self._ungroup()
        self.flat_runner.clear()
        self._held.release(self.model, self, restore)
        return self.model

    @torch.inference_mode()
    def probe(self, tokens: Sequence[int], probe: Probe, positions: Sequence[int] | None = None) -> Tensor:
        """[tokens, vocab] logits of a forward without a KV cache; the probe records what each layer passes to its attention.

        positions: of the tokens; None: 0, 1, 2, and so on.
        """
        indices = torch.arange(len(tokens), device=self.device)
        ids = torch.tensor([list(tokens)], device=self.device)
        where = indices if positions is None else torch.tensor(positions, device=self.device)
        with self._held.attending():
            out = self.model(input_ids=ids, position_ids=where[None], use_cache=False, logits_to_keep=indices, headstart=probe)
        logits: Tensor = out.logits[0]
        return logits

    def check(self) -> None:
        """Compare a tree's logits with those of sequential texts under the model's own attention, and two rows with each alone.

        A sliding window longer than `selfcheck.MAX_CHECK` tokens is not exceeded here.
        Raises ValueError, naming the model, where they differ; then the model is released.
        """
        with torch.inference_mode():
            self_check(self)
