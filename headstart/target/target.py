"""Any causal language model of transformers as a target: it scores a forest in one forward.

Only public doors are used: the model's own forward, `position_ids`, `logits_to_keep`, `output_hidden_states`, a registered
attention function and a keyword that windows it. A model that cannot be served exactly is refused by name when it is loaded.
This file knows models. It refuses to know drafters, rules and requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from headstart.speculation.tree import Forest
from headstart.target import attention
from headstart.target.attention import AttentionMetadata, Kernel, Probe
from headstart.target.cache import KVCache, LayerShape, Seating
from headstart.target.config import context_length, require_two_tokens, window_of_layer
from headstart.target.embed_head import EmbedHead
from headstart.target.held_model import HeldModel
from headstart.target.hidden_states import forward_with_hidden_states
from headstart.target.kernels.attention import wide
from headstart.target.kernels.choice import KernelChoice, choose_kernels, inexact, ungroup
from headstart.target.kernels.fuse import fuse
from headstart.target.kernels.linear import prepack
from headstart.target.kernels.restore import restore
from headstart.target.loading import load_model
from headstart.target.row_mask import RowMask, row_masks
from headstart.target.selfcheck import holds_to_the_bit, self_check

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_HELD: WeakKeyDictionary[nn.Module, dict[tuple[torch.dtype, Kernel, int], bool]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Scored:
    """logits: [asked, vocab]; features: [nodes, taps * hidden] of the tapped layers, or None without taps."""

    logits: Tensor
    features: Tensor | None


class Target:
    """A causal LM that scores forests. Wrap a model you already hold, or `load` a folder or hub id.

    The model is put in evaluation mode, and attends with this package's function whenever this target runs it; its own
    `generate` works all the while. `release` gives it back as it was. Raises ValueError, naming the model and the reason, if it
    cannot be served exactly; then the model is as it was, too.
    """

    def __init__(self, model: PreTrainedModel, *, kernel: Kernel = attention.torch_attention, check: bool = True) -> None:
        self.model: PreTrainedModel = model
        self.kernel = kernel
        self.pad_rows = model.device.type != "cpu"  # one attention call for all rows, where a call costs more than padding
        self.min_nodes = 1  # the smallest forest whose rows do not depend on its size; dead nodes fill up to it
        self.trust_remote_code = False  # whether Python files beside its weights, or a draft model's, may run
        self.is_exact = False  # whether equality to the bit is promised
        self.kernel_choice: KernelChoice | None = None
        text = model.config.get_text_config()
        self.name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        self.num_layers = int(text.num_hidden_layers)
        self.hidden = int(text.hidden_size)
        require_two_tokens(getattr(text, "max_position_embeddings", None), self.name)
        try:
            self._held = HeldModel.hold(model, self)
        except ValueError as error:
            raise ValueError(f"{self.name} ({type(model).__name__}) does not let its attention be chosen: {error}") from None
        try:
            self._examine(check)
        except BaseException:
            self.release()
            raise

    def _examine(self, check: bool) -> None:
        text = self.model.config.get_text_config()
        probe = self._probe()
        self.context = context_length(text, self.name)
        self.shapes = tuple(LayerShape(*probe.shapes[layer]) for layer in range(self.num_layers))
        self.heads = max(probe.heads.values())
        self.windows = tuple(window_of_layer(text, layer, probe.windows[layer]) for layer in range(self.num_layers))
        if check:
            self.check()

    @classmethod
    def load(
        cls, path: str | Path, dtype: str | torch.dtype = "auto", device: str = "auto", exact: bool | str = "auto",
        trust_remote_code: bool = False,
    ) -> Target:  # fmt: skip
        """From a folder or hub id, with this machine's kernels (`choose_kernels`). trust_remote_code: whether Python files in
        that folder,
        and in that of a model that drafts for it, may run."""
        target = cls(load_model(path, dtype, device, trust_remote_code), check=False)
        target.trust_remote_code = trust_remote_code
        target.choose_kernels(exact)
        target.check()
        return target

    def choose_kernels(self, exact: bool | str = "auto", *, pack: bool = True) -> None:
        """Choose this machine's kernels: the model's linears are packed in place until `release` puts them back, unless `pack` is
        False.

        exact: True for equality to the bit (ValueError where it cannot be had), "auto" for wherever it can be had on a CPU, or
        False. The choice depends on the model, the machine and the number of threads, never on time; `kernel_choice.why_not` says
        what stands against exactness. Change torch's number of threads before, not afterwards.
        """
        if exact not in (True, False, "auto"):
            raise ValueError(f"exact is {exact!r}; it must be True, False or 'auto'")
        self._ungroup()
        found = choose_kernels(self.model, self.heads, self.shapes, exact, pack)
        self._use(found)
        if not found.is_exact or self._holds(is_cached=not pack):
            return
        self._use(replace(found, kernel=wide))
        if found.kernel is wide or not self._holds(is_cached=not pack):
            self._ungroup()
            self._use(
                inexact(exact, "a node of a tree comes out with other bits than the same node alone, somewhere in the layers")
            )

    def _holds(self, is_cached: bool) -> bool:
        """Whether the whole model holds to the bit. is_cached: asked once per model, for a caller who has it again and again."""
        known = _HELD.setdefault(self.model, {}) if is_cached else {}
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

    # -- what it is --

    def __repr__(self) -> str:
        why_not = self.kernel_choice.why_not if self.kernel_choice else "its kernels were not chosen, see `choose_kernels`"
        promise = "exact to the bit" if self.is_exact else f"exact up to near ties: {why_not}"
        return f"Target({self.name!r}, {str(self.dtype).removeprefix('torch.')} on {self.device}, {promise})"

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        return sum(shape.slot_bytes(self.dtype) for shape in self.shapes)

    def new_cache(self, seating: Seating) -> KVCache:
        return KVCache(self.shapes, seating, self.device, self.dtype)

    @cached_property
    def embed_head(self) -> EmbedHead:
        """Embedding and head, for drafters that borrow them. Raises ValueError where the head does something unknown."""
        return EmbedHead(self.model)

    def pack_drafter(self, drafter: nn.Module) -> None:
        """Give a drafter's modules this machine's kernels too, in place and for good."""
        if self.kernel_choice is not None and self.device.type == "cpu":
            fuse(drafter)
            prepack(drafter)

    # -- what it does --

    def score(self, forest: Forest, cache: KVCache, seats: Sequence[int], taps: Sequence[int] = ()) -> Scored:
        """One forward over a forest: logits of the asked nodes, and features of all nodes at the tapped layers.

        seats: the seat of each row. Tap `i` is the output of layer `i` (0 is the first layer's; -1 the last one's, normed).
        """
        return self.forward(forest.tokens, forest.positions, row_masks(forest, cache, seats), cache, forest.asked, taps)

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor, positions: Tensor, seen: Sequence[RowMask], cache: KVCache, asked: Tensor, taps: Sequence[int] = ()
    ) -> Scored:
        """The forward underneath `score`, for drafters that grow a tree level by level in their own cache."""
        if self not in self._held:
            raise ValueError(f"{self.name} was released and no longer attends as a target; make a new Target of it")
        metadata = AttentionMetadata(seen, cache, self.kernel, self.windows, self.pad_rows)
        layers = [tap % self.num_layers for tap in taps]
        with self._held.attending():
            out, states = forward_with_hidden_states(
                self.model,
                layers,
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=asked,
                headstart=metadata,
            )
        features = torch.cat([states[layer][0] for layer in layers], -1) if taps else None
        return Scored(out.logits[0], features)

    # -- how it is examined --

    @contextmanager
    def original(self) -> Iterator[PreTrainedModel]:
        """The model with the attention it came with, as an oracle."""
        yield self.model

    def release(self) -> PreTrainedModel:
        """Give the model back: this target scores no more. When no other target holds it either, linears, norms and MLPs that
        `choose_kernels` replaced are put back with the same bits, and modules that were training train again. A second call does
        nothing.
        """
        self._ungroup()
        self._held.release(self.model, self, restore)
        return self.model

    @torch.inference_mode()
    def examined(self, tokens: Sequence[int], probe: Probe, positions: Sequence[int] | None = None) -> Tensor:
        """[tokens, vocab] of a few tokens, without a cache, at these positions or 0, 1, 2, and so on.

        The probe records what windows the attention function.
        """
        places = torch.arange(len(tokens), device=self.device)
        ids = torch.tensor([list(tokens)], device=self.device)
        where = places if positions is None else torch.tensor(positions, device=self.device)
        with self._held.attending():
            out = self.model(input_ids=ids, position_ids=where[None], use_cache=False, logits_to_keep=places, headstart=probe)
        logits: Tensor = out.logits[0]
        return logits

    def _probe(self) -> Probe:
        """Two tokens through the model: what windows the attention function, layer by layer."""
        probe = Probe()
        kind = type(self.model).__name__
        try:
            logits = self.examined([0, 1], probe)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.name} ({kind}) cannot be a target: {error}") from None
        missing = self.num_layers - len(probe.shapes)
        if missing:
            what = "bypasses the attention interface of transformers (alibi, or modelling code older than it)"
            if probe.shapes:
                what = f"keeps a state of its own in {missing} of {self.num_layers} layers (recurrent or linear attention)"
            raise ValueError(f"{self.name} ({kind}) cannot be a target: it {what}")
        if bool(logits.isnan().any()):
            raise ValueError(
                f"{self.name} ({kind}) cannot be a target: it answers with nan, so its weights are damaged; copy them again"
            )
        if probe.masking:
            layers = ", ".join(sorted(probe.masking))
            raise ValueError(f"{self.name} ({kind}) cannot be a target: {layers} hands its attention a mask of its own making")
        if probe.looking_ahead or not getattr(self.model.config.get_text_config(), "is_causal", True):
            layers = ", ".join(sorted(probe.looking_ahead)) or "config.is_causal"
            raise ValueError(f"{self.name} ({kind}) cannot be a target: its attention sees later tokens too ({layers})")
        self.vocab = int(logits.shape[-1])
        return probe

    def check(self) -> None:
        """Compare a tree with the sequential text, by the model's own attention, and two rows with each alone.

        Raises ValueError, naming the model, where they differ. A window longer than `MAX_CHECK` tokens is not exceeded here.
        """
        with torch.inference_mode():
            self_check(self)
