"""Decoder layers of a drafter's own: transformers' layers of any family, fed with states instead of tokens.

`decoder` makes them, `unrolled` runs them as training does when a layer is fed its own output, `Memory` runs them while drafting,
with keys and values of their own. Those of the plainest families are in `headstart.drafters.parts.llama_layer`. This file knows
layers and
seats. It refuses to know methods, targets and losses.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headstart.drafters.parts.grow import Level
from headstart.drafters.parts.llama_layer import input_width, is_llama_like, run_layers
from headstart.target import attention
from headstart.target.attention import AttentionMetadata, Probe, RowMask, Window
from headstart.target.cache import KVCache, LayerShape, Seating

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What says nothing about a layer.
_NOT_OF_LAYERS = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "quantization_config",
    "tie_word_embeddings", "transformers_version", "use_cache", "vocab_size",
}  # fmt: skip


def block_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Settings for `decoder` of one layer of the kind that a model's last one is."""
    text = config.get_text_config()
    count = int(text.num_hidden_layers)
    settings = {name: value for name, value in text.to_diff_dict().items() if name not in _NOT_OF_LAYERS}
    per_layer: dict[str, Any] = {
        name: value[-1:] for name, value in settings.items() if isinstance(value, list) and len(value) == count
    }
    if settings.get("first_k_dense_replace", count) < count:
        per_layer["first_k_dense_replace"] = 0  # the last layer has experts, and the only one is the first
    return {**settings, **per_layer, "num_hidden_layers": 1, "model_type": text.model_type}


def decoder(settings: Mapping[str, Any], hidden: int) -> Any:
    """A model of transformers without embedding and head: [rows, length, hidden] `inputs_embeds` -> `last_hidden_state`, normed.

    settings: of its configuration, `model_type` among them. Raises ValueError where transformers does not know them, or they are
    of another hidden size.
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
    """One more norm of the kind that ends a new decoder, with the weights that such a norm begins with, of another `width`
    perhaps."""
    last = [child for child in model.children() if [weight.dim() for weight in child.parameters()] in ([1], [1, 1])][-1]
    norm: nn.Module = copy.deepcopy(last)
    if width is not None:
        for name, weight in list(norm.named_parameters()):
            setattr(norm, name, nn.Parameter(weight.detach()[:1].repeat(width)))
    return norm


def unrolled(model: Any, inputs: Tensor, step: int, positions: Tensor, cache: Any) -> Tensor:
    """One step of a layer that is fed its own output, at all positions of whole texts at once.

    At step 0 this is causal attention. Later, position t sees the keys of step 0 up to t, and of each step since then only its
    own: what a chain sees that was drafted from t. inputs: [rows, length, hidden]; positions: [length] of the tokens; cache: a
    `DynamicCache` that holds the steps before (None: there will be no other). Returns [rows, length, hidden].
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
    """[1, 1, length, (1 + step) * length], as the layer's attention wants it: bool for torch's own, else additive."""
    length, device = inputs.shape[1], inputs.device
    places = torch.arange(length, device=device)
    behind = places[:, None] - places
    seen = behind >= 0
    window = _window(model.config)
    if window is not None:
        seen = seen & (behind + step < window)
    visible = torch.cat([seen, *[behind == 0] * step], 1)[None, None]
    if model.config._attn_implementation == "sdpa":
        return visible
    return torch.zeros(visible.shape, dtype=inputs.dtype, device=device).masked_fill(~visible, torch.finfo(inputs.dtype).min)


def _window(config: Any) -> int | None:
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) if kinds is None or kinds[0] == "sliding_attention" else None


def memory_shapes(model: Any) -> tuple[tuple[LayerShape, ...], tuple[Window, ...]]:
    """What each layer of a decoder stores per token, and how far back it looks: heard from the layers themselves."""
    attention.register()
    before, probe = model.config._attn_implementation, Probe()
    weight = next(model.parameters())
    one = torch.zeros(1, 1, input_width(model), dtype=weight.dtype, device=weight.device)
    model.set_attn_implementation(attention.NAME)
    try:
        with torch.no_grad():
            model(inputs_embeds=one, position_ids=torch.zeros(1, 1, dtype=torch.int64, device=weight.device), use_cache=False,
                  headstart=probe)  # fmt: skip
    finally:
        model.set_attn_implementation(before)
    places = range(len(probe.shapes))
    return tuple(LayerShape(*probe.shapes[i]) for i in places), tuple(Window(probe.windows[i]) for i in places)


def slot_bytes(model: Any) -> int:
    """Of a decoder's keys and values per token, in the precision that it has now."""
    dtype = next(model.parameters()).dtype
    return sum(shape.slot_bytes(dtype) for shape in memory_shapes(model)[0])


class Memory:
    """A decoder with keys and values of its own for every seat. What `extend` read stays; what `level` read is scratch behind it,
    overwritten by the next round."""

    def __init__(self, model: Any, seating: Seating, device: torch.device, dtype: torch.dtype) -> None:
        shapes, self._reaches = memory_shapes(model)
        self._model = model
        self._together = device.type != "cpu"  # one attention call for all rows, where a call costs more than padding
        model.set_attn_implementation(attention.NAME)
        _renew_tables(model, device)
        self._cache = KVCache(shapes, seating, device, dtype)

    def length(self, seat: int) -> int:
        """How many entries a seat has."""
        return self._cache.lengths[seat]

    def extend(self, inputs: Tensor, positions: Tensor, seats: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Read more of each seat's text. inputs: [n, hidden], `lengths` of them for each of `seats`; positions: [n]. Returns
        [n, hidden]."""
        row_masks, first = [], 0
        for seat, length in zip(seats, lengths, strict=True):
            held = self.length(seat)
            slots = torch.arange(held, held + length, device=inputs.device)
            row_masks.append(RowMask(first, first + length, self._cache.seating[seat].start, held, None, slots))
            first += length
        states = self._run(inputs, positions, row_masks)
        self._cache.commit(seats, lengths, [()] * len(seats))
        return states

    def level(self, inputs: Tensor, positions: Tensor, seats: Sequence[int], level: Level) -> Tensor:
        """Read one level of a tree, behind what each row's seat and the levels before hold. inputs: [rows * width, hidden], seats:
        of the level's rows; positions: [rows * width]. Returns [rows * width, hidden]."""
        width, row_masks = level.width, []
        for place, seat in enumerate(seats):
            held = self.length(seat)
            slots = held - 1 + level.depths
            start = self._cache.seating[seat].start
            row_masks.append(RowMask(place * width, (place + 1) * width, start, held, level.tree_mask[place], slots, level.earlier))
        return self._run(inputs, positions, row_masks)

    def fork(self, source: int, seat: int, length: int) -> None:
        """Copy the first `length` entries, or as many as there are."""
        self._cache.fork(source, seat, min(length, self.length(source)))

    def free(self, seat: int) -> None:
        self._cache.free(seat)

    def snapshot(self) -> list[int]:
        """How many entries each seat has: what lies behind them is scratch."""
        return list(self._cache.lengths)

    def restore(self, lengths: list[int]) -> None:
        self._cache.lengths[:] = lengths

    def _run(self, inputs: Tensor, positions: Tensor, row_masks: Sequence[RowMask]) -> Tensor:
        metadata = AttentionMetadata(row_masks, self._cache, attention.fused, self._reaches, self._together)
        if is_llama_like(self._model):
            return run_layers(self._model, inputs[None], positions[None], metadata)[0]
        out = self._model(inputs_embeds=inputs[None], position_ids=positions[None], use_cache=False, headstart=metadata)
        states: Tensor = out.last_hidden_state[0]
        return states


def _renew_tables(model: Any, device: torch.device) -> None:
    """Tables of angles are float32 whatever the weights are; casting a model rounds them."""
    for name, module in list(model.named_modules()):
        if module._non_persistent_buffers_set and any(table.is_floating_point() for table in module.buffers(recurse=False)):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, type(module)(model.config).to(device))
