"""Decoder layers of a drafter, of any family that transformers has, fed with states instead of tokens.

`decoder` makes them, `unrolled` runs them as training does when a layer reads its own output, `Memory` runs them while drafting,
with a KV cache. Must not import a method or a loss. Llama-like layers: `headstart.drafters.parts.llama_layer`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headstart.drafters.parts.grow import Level
from headstart.drafters.parts.llama_layer import STEADY, RopeTable, input_width, is_llama_like, record_layers, run_layers
from headstart.target import attention
from headstart.target.attention import AttentionMetadata, Probe, RowsKernel
from headstart.target.cache import KVCache, LayerShape, Seating
from headstart.target.flat_mask import FlatMask
from headstart.target.flat_rows import FlatRows, level_rows, text_rows
from headstart.target.graphs import FlatRunner
from headstart.target.layer_attention import attention_for
from headstart.target.row_mask import RowMask, Window
from headstart.target.steps import Steps, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Settings of a model that do not describe its layers.
_NOT_OF_LAYERS = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "quantization_config",
    "tie_word_embeddings", "transformers_version", "use_cache", "vocab_size",
}  # fmt: skip


def block_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Settings for `decoder` of one layer like the last layer of a model."""
    text = config.get_text_config()
    count = int(text.num_hidden_layers)
    settings = {name: value for name, value in text.to_diff_dict().items() if name not in _NOT_OF_LAYERS}
    per_layer: dict[str, Any] = {
        name: value[-1:] for name, value in settings.items() if isinstance(value, list) and len(value) == count
    }
    if settings.get("first_k_dense_replace", count) < count:
        per_layer["first_k_dense_replace"] = 0  # the last layer has experts, so the only one must have them
    return {**settings, **per_layer, "num_hidden_layers": 1, "model_type": text.model_type}


def decoder(settings: Mapping[str, Any], hidden: int) -> Any:
    """A model of transformers without embedding and LM head: [rows, length, hidden] `inputs_embeds` -> `last_hidden_state`, normed.

    settings: of its configuration, with `model_type`.
    Raises ValueError where transformers cannot make a model of them, or their hidden size is another one.
    """
    from transformers import AutoConfig, AutoModel

    named = {name: value for name, value in settings.items() if name != "model_type"}
    tokens = {"vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    try:
        config = AutoConfig.for_model(str(settings.get("model_type")), **named, **tokens)
        model = AutoModel.from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"a layer of model_type {settings.get('model_type')!r} cannot be made: {error}") from None
    if int(config.hidden_size) != hidden:
        raise ValueError(f"the drafter's layer has a hidden size of {config.hidden_size}, the target one of {hidden}")
    model.set_input_embeddings(None)
    return model


def norm_like(model: Any, width: int | None = None) -> nn.Module:
    """A copy of the norm at the end of a new decoder, with its initial weights. width: of the copy; None: the same."""
    last = [child for child in model.children() if [weight.dim() for weight in child.parameters()] in ([1], [1, 1])][-1]
    norm: nn.Module = copy.deepcopy(last)
    if width is not None:
        for name, weight in list(norm.named_parameters()):
            setattr(norm, name, nn.Parameter(weight.detach()[:1].repeat(width)))
    return norm


def unrolled(model: Any, inputs: Tensor, step: int, positions: Tensor, cache: Any) -> Tensor:
    """One step of a decoder that reads its own output, at all positions of the texts at once. Returns [rows, length, hidden].

    At step 0 this is causal attention. At later steps, position t attends to the keys of step 0 up to t, and of each step since
    then only to its own: as a chain does that was drafted from t.

    inputs: [rows, length, hidden].
    step: from 0.
    positions: [length] of the tokens.
    cache: a `DynamicCache` with the steps before; None where there is only one step.
    """
    mask = _chain_mask(model, inputs, step) if step else None
    out = model(
        inputs_embeds=inputs,
        position_ids=positions[None],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    states: Tensor = out.last_hidden_state
    return states


def _chain_mask(model: Any, inputs: Tensor, step: int) -> Tensor:
    """[1, 1, length, (1 + step) * length] attention mask: bool for sdpa, else additive."""
    length, device = inputs.shape[1], inputs.device
    indices = torch.arange(length, device=device)
    distance = indices[:, None] - indices
    causal = distance >= 0
    window = _window(model.config)
    if window is not None:
        causal = causal & (distance + step < window)
    mask = torch.cat([causal, *[distance == 0] * step], 1)[None, None]
    if model.config._attn_implementation == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=inputs.dtype, device=device).masked_fill(~mask, torch.finfo(inputs.dtype).min)


def _window(config: Any) -> int | None:
    """The sliding window of the first layer, in tokens; None for full attention."""
    layer_types = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) if layer_types is None or layer_types[0] == "sliding_attention" else None


def memory_shapes(model: Any) -> tuple[tuple[LayerShape, ...], tuple[Window, ...]]:
    """What each layer of a decoder stores per token, and its sliding window: found by running the layers on one token."""
    attention.register()
    implementation, probe = model.config._attn_implementation, Probe()
    weight = next(model.parameters())
    one = torch.zeros(1, 1, input_width(model), dtype=weight.dtype, device=weight.device)
    model.set_attn_implementation(attention.NAME)
    try:
        with torch.no_grad():
            model(inputs_embeds=one, position_ids=torch.zeros(1, 1, dtype=torch.int64, device=weight.device), use_cache=False,
                  headstart=probe)  # fmt: skip
    finally:
        model.set_attn_implementation(implementation)
    layers = range(len(probe.shapes))
    return tuple(LayerShape(*probe.shapes[i]) for i in layers), tuple(Window(probe.windows[i]) for i in layers)


def slot_bytes(model: Any) -> int:
    """Bytes of a decoder's keys and values per token, in the precision of its weights."""
    dtype = next(model.parameters()).dtype
    return sum(shape.slot_bytes(dtype) for shape in memory_shapes(model)[0])


class Memory:
    """A decoder with a KV cache of its own for every seat.

    Entries of `extend` stay. Entries of `level` are scratch behind them, which the next round overwrites.

    model: of `decoder`; its attention is replaced.
    seating: which slots each seat has.
    runner: runs all rows in one attention call, as a target's `flat_runner`; None: row by row.
    """

    def __init__(
        self, model: Any, seating: Seating, device: torch.device, dtype: torch.dtype, runner: FlatRunner | None = None
    ) -> None:
        shapes, self._windows = memory_shapes(model)
        self._model = model
        self._kernel = attention_for(shapes, dtype, device)
        self._runner = runner
        model.set_attn_implementation(attention.NAME)
        _restore_rope(model, device)
        self._cache = KVCache(shapes, seating, device, dtype, has_sink=runner is not None)

    def length(self, seat: int) -> int:
        """Number of entries of a seat, without scratch."""
        return self._cache.lengths[seat]

    def extend(self, inputs: Tensor, positions: Tensor, seats: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Run the decoder over more of each seat's text, and keep the entries. Returns [n, hidden].

        inputs: [n, input width], one seat after another.
        positions: [n].
        seats, lengths: how many of the inputs each seat has.
        """
        kept = torch.tensor([self.length(seat) for seat in seats])
        counts = torch.tensor(lengths)
        shifts = torch.repeat_interleave(kept - counts.cumsum(0) + counts, counts)  # on the host
        slots = (shifts + torch.arange(len(shifts))).to(inputs.device, non_blocking=True)
        rows = text_rows(self._cache, seats, lengths, slots, is_flat=self._runner is not None)
        states = self._run(inputs, positions, rows)
        self._cache.commit(seats, lengths, [()] * len(seats))
        return states

    def level(self, inputs: Tensor, positions: Tensor, seats: Sequence[int], level: Level) -> Tensor:
        """Run the decoder over one level of a tree, behind the entries of each row's seat and of the levels before.

        inputs: [rows * width, input width].
        positions: [rows * width].
        seats: of the level's rows.
        Returns [rows * width, hidden].
        """
        lengths = [self.length(seat) for seat in seats]
        if len(lengths) == 1:
            slots = (level.depths + (lengths[0] - 1))[None]
        else:
            slots = torch.tensor(lengths).to(positions.device, non_blocking=True)[:, None] - 1 + level.depths
        rows = level_rows(self._cache, seats, level.tree_mask, slots, is_flat=self._runner is not None)
        return self._run(inputs, positions, rows)

    @property
    def dtype(self) -> torch.dtype:
        """Of keys, values and states."""
        return self._cache.layer(0)[0].dtype

    def first_slot(self, seat: int) -> int:
        """The first slot of a seat."""
        return self._cache.seating[seat].start

    def hides(self, length: int) -> bool:
        """Whether a layer's window hides some of the entries of a text of this length."""
        return any(window.hides(length) for window in self._windows)

    def angles(self, positions: int) -> tuple[Tensor, Tensor] | None:
        """[at least `positions`, head dim] cosines and sines of the rotary embedding; None where there is no table of that size."""
        rope = self._model.rotary_emb
        tables: tuple[Tensor, Tensor] | None = rope.tables(self._cache.layer(0)[0], positions)
        return tables

    def record(self, steps: Steps, inputs: Sequence[int]) -> int:
        """The decoder as steps: from its inputs, see `record_layers`, to its output, values all of them.

        Raises UnsupportedError where it does not consist of compiled modules.
        """
        is_compiled = self._runner is None and isinstance(self._kernel, RowsKernel) and is_llama_like(self._model)
        if not is_compiled or not isinstance(self._model.rotary_emb, RopeTable):
            raise UnsupportedError
        return record_layers(self._model, steps, self._cache, inputs)

    def fork(self, source: int, seat: int, length: int) -> None:
        """Copy the first `length` entries of seat `source` to another seat, or as many as there are."""
        self._cache.fork(source, seat, min(length, self.length(source)))

    def free(self, seat: int) -> None:
        """Drop the entries of a seat."""
        self._cache.free(seat)

    def snapshot(self) -> list[int]:
        """The number of entries of every seat; entries behind these are scratch."""
        return list(self._cache.lengths)

    def restore(self, lengths: list[int]) -> None:
        """Return to a snapshot."""
        self._cache.lengths[:] = lengths

    def _run(self, inputs: Tensor, positions: Tensor, rows: Sequence[RowMask] | FlatRows) -> Tensor:
        named = {"inputs": inputs, "text_positions": positions}
        if self._runner is None or not isinstance(rows, FlatRows):
            assert not isinstance(rows, FlatRows), "rows as tensors need a runner"
            return self._states(named, None, rows)[0]
        return self._runner.run(id(self), self._cache, rows, named, self._states, (len(inputs),))[0]

    def _states(self, named: Mapping[str, Tensor], flat: FlatMask | None, masks: Sequence[RowMask] = ()) -> tuple[Tensor]:
        """[n, hidden] the decoder's output. With a flat mask this may be captured in a graph."""
        inputs, positions = named["inputs"][None], named["text_positions"][None]
        kernel = None if self._runner is None else self._runner.kernel
        metadata = AttentionMetadata(masks, self._cache, self._kernel, self._windows, flat, kernel)
        if is_llama_like(self._model):
            return (run_layers(self._model, inputs, positions, metadata)[0],)
        out = self._model(inputs_embeds=inputs, position_ids=positions, use_cache=False, headstart=metadata)
        return (out.last_hidden_state[0],)


def _restore_rope(model: Any, device: torch.device) -> None:
    """Make the RoPE modules anew: their frequencies are float32 in any precision, and casting a model rounds them."""
    for name, module in list(model.named_modules()):
        if isinstance(module, RopeTable):  # of an earlier target
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.module)
    for name, module in list(model.named_modules()):
        if module._non_persistent_buffers_set and any(buffer.is_floating_point() for buffer in module.buffers(recurse=False)):
            parent, _, attribute = name.rpartition(".")
            made = type(module)(model.config).to(device)
            is_steady = device.type == "cpu" and is_llama_like(model) and getattr(made, "rope_type", "") in STEADY
            setattr(model.get_submodule(parent), attribute, RopeTable(made) if is_steady else made)
