"""Any causal language model of transformers as a target: it scores a forest in one forward.

Only public doors are used: the model's own forward, `position_ids`, `logits_to_keep`, `output_hidden_states`, a registered
attention function and a keyword that reaches it. A model that cannot be served exactly is refused by name when it is loaded.
This file knows models. It refuses to know drafters, rules and requests.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headstart import attention
from headstart.attention import Gaze, Kernel, Probe, Reach, Sight
from headstart.cache import KVCache, LayerShape, Seating
from headstart.kernels.choice import Equipment, equip
from headstart.tree import Drafts, Forest, merge

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Scored:
    """logits: [asked, vocab]; features: [nodes, taps * hidden] of the tapped layers, or None without taps."""

    logits: Tensor
    features: Tensor | None


class Target:
    """A causal LM that scores forests. Wrap a model you already hold, or `load` a folder or hub id.

    The model is put in evaluation mode and its attention is replaced by this package's; `release` gives it back. Raises
    ValueError, naming the model and the reason, if it cannot be served exactly.
    """

    def __init__(self, model: PreTrainedModel, *, kernel: Kernel = attention.fused, check: bool = True) -> None:
        self.model: PreTrainedModel = model.eval()
        self.kernel = kernel
        self.together = model.device.type != "cpu"  # one attention call for all rows, where a call costs more than padding
        self.min_nodes = 1  # the smallest forest whose rows do not depend on its size; dead nodes fill up to it
        self.is_exact = False  # whether equality to the bit is promised
        self.equipment: Equipment | None = None
        text = model.config.get_text_config()
        self.name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        self.num_layers = int(text.num_hidden_layers)
        self.hidden = int(text.hidden_size)
        self._found_attention = str(model.config._attn_implementation)
        is_held = self._found_attention == attention.NAME  # by another target
        self._original_attention = "eager" if is_held else self._found_attention
        attention.register()
        self._switch(attention.NAME)
        probe = self._probe()
        self.context = _context(text, self.name)
        self.shapes = tuple(LayerShape(*probe.shapes[layer]) for layer in range(self.num_layers))
        self.heads = max(probe.heads.values())
        self.reaches = tuple(_reach(text, layer, probe.windows[layer]) for layer in range(self.num_layers))
        if check:
            self.check()

    @classmethod
    def load(cls, path: str | Path, dtype: str | torch.dtype = "auto", device: str = "auto", exact: bool | str = "auto") -> Target:
        """From a folder or hub id, with this machine's kernels (`equip`)."""
        target = cls(load_model(path, dtype, device), check=False)
        target.equip(exact)
        target.check()
        return target

    def equip(self, exact: bool | str = "auto") -> None:
        """Choose this machine's kernels: the model's linears are packed in place, and stay so.

        exact: True for equality to the bit (ValueError where it cannot be had), False, or "auto" for where it is nearly free.
        """
        if exact not in (True, False, "auto"):
            raise ValueError(f"exact is {exact!r}; it must be True, False or 'auto'")
        self.equipment = equip(self.model, self.heads, self.shapes, exact, self._seconds)
        self.kernel = self.equipment.kernel
        self.min_nodes = self.equipment.min_nodes
        self.is_exact = self.equipment.is_exact

    def _seconds(self, kernel: Kernel, nodes: int) -> float:
        """How long one pass of `nodes` nodes behind up to 256 tokens takes with a kernel."""
        behind = min(256, self.context - nodes)
        seating = Seating(1, behind + nodes)
        cache, seat = self.new_cache(seating), seating.take(behind + nodes)
        assert seat is not None
        cache.lengths[seat] = behind
        forest = merge([[0] * nodes], [behind], [False], Drafts.none(self.device))
        before, self.kernel = self.kernel, kernel
        began = time.perf_counter()
        self.score(forest, cache, [seat])
        spent = time.perf_counter() - began
        self.kernel = before
        return spent

    # -- what it is --

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

    # -- what it does --

    def score(self, forest: Forest, cache: KVCache, seats: Sequence[int], taps: Sequence[int] = ()) -> Scored:
        """One forward over a forest: logits of the asked nodes, and features of all nodes at the tapped layers.

        seats: the seat of each row. Tap `i` is the output of layer `i` (0 is the first layer's; -1 the last one's, normed).
        """
        return self.forward(forest.tokens, forest.positions, sights(forest, cache, seats), cache, forest.asked, taps)

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor, positions: Tensor, seen: Sequence[Sight], cache: KVCache, asked: Tensor, taps: Sequence[int] = ()
    ) -> Scored:
        """The forward underneath `score`, for drafters that grow a tree level by level in their own cache."""
        gaze = Gaze(seen, cache, self.kernel, self.reaches, self.together)
        states = [tap % self.num_layers + 1 for tap in taps]  # transformers counts the embedding as state 0
        extra: dict[str, Any] = {"output_hidden_states": states} if taps else {}
        out = self.model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, logits_to_keep=asked, headstart=gaze, **extra
        )
        features = torch.cat([out.hidden_states[state][0] for state in states], -1) if taps else None
        return Scored(out.logits[0], features)

    # -- how it is examined --

    @contextmanager
    def original(self) -> Iterator[PreTrainedModel]:
        """The model with the attention it came with, as an oracle."""
        self._switch(self._original_attention)
        try:
            yield self.model
        finally:
            self._switch(attention.NAME)

    def release(self) -> PreTrainedModel:
        self._switch(self._found_attention)
        return self.model

    def _switch(self, name: str) -> None:
        try:
            self.model.set_attn_implementation(name)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{self.name} ({type(self.model).__name__}) does not let its attention be chosen: {error}") from None

    @torch.inference_mode()
    def _probe(self) -> Probe:
        """Two tokens through the model: what reaches the attention function, layer by layer."""
        probe = Probe()
        ids = torch.tensor([[0, 1]], device=self.device)
        kind = type(self.model).__name__
        try:
            logits = self.model(
                input_ids=ids,
                position_ids=torch.tensor([[0, 1]], device=self.device),
                use_cache=False,
                logits_to_keep=torch.tensor([0, 1], device=self.device),
                headstart=probe,
            ).logits
        except (TypeError, ValueError, RuntimeError) as error:
            self.release()
            raise ValueError(f"{self.name} ({kind}) cannot be a target: {error}") from None
        missing = self.num_layers - len(probe.shapes)
        if missing:
            self.release()
            what = "bypasses the attention interface of transformers (alibi, or modelling code older than it)"
            if probe.shapes:
                what = f"keeps a state of its own in {missing} of {self.num_layers} layers (recurrent or linear attention)"
            raise ValueError(f"{self.name} ({kind}) cannot be a target: it {what}")
        self.vocab = int(logits.shape[-1])
        return probe

    def check(self) -> None:
        """Compare a tree with the sequential text, by the model's own attention, and two rows with each alone.

        Raises ValueError, naming the model, where they differ. A window longer than `MAX_CHECK` tokens is not exceeded here.
        """
        with torch.inference_mode():
            _self_check(self)


MAX_CHECK = 600  # tokens; a longer window is not run into at load


def sights(forest: Forest, cache: KVCache, seats: Sequence[int]) -> list[Sight]:
    """Every row's sight of a target forest."""
    result: list[Sight] = []
    first = draft = 0
    for seat, stem, count in zip(seats, forest.stems, forest.counts, strict=True):
        last = first + stem + count
        seen = _seen(forest.lineage[draft : draft + count, draft : draft + count], stem) if count else None
        place = cache.seating[seat]
        if cache.lengths[seat] + last - first > place.capacity:
            raise AssertionError(f"row of {last - first} nodes behind {cache.lengths[seat]} exceeds its {place.capacity} slots")
        result.append(Sight(first, last, place.start, cache.lengths[seat], seen, forest.positions[first:last]))
        first, draft = last, draft + count
    return result


def _seen(lineage: Tensor, stem: int) -> Tensor:
    """[stem + drafts, stem + drafts] bool: stem nodes see the stem before them, drafts all of it and their ancestors."""
    size = stem + lineage.shape[0]
    seen = torch.ones(size, size, dtype=torch.bool, device=lineage.device).tril_()
    seen[stem:, stem:] = lineage
    return seen


# -- reading a configuration ------------------------------------------------------------------------------------------------


def _reach(config: Any, layer: int, window: int | None) -> Reach:
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else None
    if kind == "chunked_attention":
        return Reach(chunk=int(config.attention_chunk_size))
    if kind == "sliding_attention" and window is None:
        window = int(config.sliding_window)
    return Reach(window=window)


def _context(config: Any, name: str) -> int:
    """The longest text the target handles exactly."""
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None:
        raise ValueError(f"{name} does not say how long a text it takes (max_position_embeddings is missing in its config)")
    for rope in _ropes(getattr(config, "rope_parameters", None) or {}):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            # Frequencies follow the longest position of the whole forward: beyond this, one row would change its neighbours.
            original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
            longest = min(longest, original or longest)
    if getattr(config, "attn_temperature_tuning", False) and hasattr(config, "floor_scale"):
        longest = min(longest, int(config.floor_scale) - 1)  # from here on Llama 4 counts nodes, not positions
    return int(longest)


def _ropes(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    nested = [rope for rope in parameters.values() if isinstance(rope, dict)]
    return nested or [parameters]


def digest(model: PreTrainedModel) -> str:
    """A fingerprint that tells a fine-tune: the LM head and three layers' weights, sampled."""
    sha = hashlib.sha256(json.dumps(model.config.to_diff_dict(), sort_keys=True, default=str).encode())
    state = model.state_dict()
    names = sorted(state)
    head = [name for name in names if "lm_head" in name or "embed" in name]
    for name in [*head, *names[:: max(1, len(names) // 3)]]:
        flat = state[name].detach().reshape(-1)
        sha.update(flat[:: max(1, len(flat) // 4096)].float().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


# -- loading ----------------------------------------------------------------------------------------------------------------


def load_model(path: str | Path, dtype: str | torch.dtype = "auto", device: str = "auto") -> PreTrainedModel:
    """A causal LM from a folder or the hub. Raises ValueError in one sentence for everything that can be wrong with it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    place = _device(device)
    check_folder(path)
    try:
        config = AutoConfig.from_pretrained(path)
        if type(config) not in AutoModelForCausalLM._model_mapping or not _is_causal(config.architectures):
            kind = (config.architectures or [config.model_type])[0]
            raise ValueError(f"it holds a {kind}, which is not a causal language model")
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
        model, info = loaded
    except Exception as error:  # safetensors, json and hub errors share no base class
        why = "its weights are damaged or cut short: " if "Safetensor" in type(error).__name__ else ""
        raise ValueError(f"model {path} cannot be loaded: {why}{_first_line(error)}") from error
    broken = {kind: sorted(names) for kind, names in info.items() if names and kind in ("missing_keys", "mismatched_keys")}
    if broken:
        kind, names = next(iter(broken.items()))
        raise ValueError(f"model {path} is not whole: {len(names)} {kind.replace('_', ' ')}, first {names[0]}")
    placed: PreTrainedModel = model.to(place)
    return placed


def check_folder(path: str | Path) -> None:
    """Raise ValueError if `path` looks like a folder and holds no model; a hub id passes."""
    folder = Path(path)
    looks_local = folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1
    if looks_local and not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist" if not folder.exists() else "is not a folder"
        raise ValueError(f"model folder {path} {what}; a model is a folder with config.json, weights and tokenizer, or a hub id")


def _is_causal(architectures: Sequence[str] | None) -> bool:
    """By name: the same weights may be stored for another task, as a masked language model or a classifier."""
    return not architectures or any(re.search("CausalLM|LMHead|ConditionalGeneration", name) for name in architectures)


def _device(name: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown; write auto, cpu, cuda or cuda:NUMBER") from None
    if device.type == "cuda" and (not has_cuda or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {name!r} is not there; torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


# -- the self-check ---------------------------------------------------------------------------------------------------------


def _self_check(target: Target) -> None:
    windows = [limit for reach in target.reaches for limit in (reach.window, reach.chunk) if limit is not None]
    beyond = min((limit + 5 for limit in windows), default=24)
    length = min(beyond if beyond <= MAX_CHECK else 24, target.context - 8)
    if length < 4:
        return
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, target.vocab, (size,), generator=generator).tolist() for size in (length, max(3, length // 2))]
    branches = torch.randint(0, target.vocab, (2, 2), generator=generator).tolist()
    branches[1][0] = (branches[0][0] + 1) % target.vocab  # siblings are distinct
    expected = [_own_logits(target, text, branches) for text in texts]
    for rows in ([0, 1], [0], [1]):
        found = _tree_logits(target, [texts[row] for row in rows], branches)
        for row, logits in zip(rows, found, strict=True):
            _compare(target, expected[row], logits, "two rows together" if len(rows) > 1 else "a tree")


def _own_logits(target: Target, text: list[int], branches: list[list[int]]) -> Tensor:
    """[1 + 4, vocab] by the model's own attention, one forward per branch: root, then each branch's two nodes."""
    with target.original() as model:
        out = [
            model(input_ids=torch.tensor([text + branch], device=target.device), use_cache=False).logits[0, len(text) - 1 :]
            for branch in branches
        ]
    return torch.cat([out[0][:1], out[0][1:], out[1][1:]])


def _tree_logits(target: Target, texts: list[list[int]], branches: list[list[int]]) -> list[Tensor]:
    """The same nodes by two forwards of forests: the prompts without their roots, then roots and both branches at once."""
    capacity = max(map(len, texts)) + 8
    seating = Seating(len(texts), capacity * len(texts))
    cache = target.new_cache(seating)
    seats = [seating.take(capacity) or 0 for _ in texts]
    prompts = merge([text[:-1] for text in texts], [0] * len(texts), [False] * len(texts), Drafts.none(target.device))
    target.score(prompts, cache, seats)
    cache.commit(seats, prompts.stems, [()] * len(texts))
    tokens = [token for branch in branches for token in branch]
    rows = [row for row in range(len(texts)) for _ in tokens]
    parents = [parent + 4 * row if parent >= 0 else parent for row in range(len(texts)) for parent in (-1, 0, -1, 2)]
    drafts = Drafts.of(tokens * len(texts), parents, rows, [1, 2, 1, 2] * len(texts), [1.0] * len(rows), device=target.device)
    forest = merge([text[-1:] for text in texts], [len(text) - 1 for text in texts], [True] * len(texts), drafts)
    return list(target.score(forest, cache, seats).logits.split(5))


def _compare(target: Target, expected: Tensor, found: Tensor, what: str) -> None:
    tolerance = {torch.float64: 1e-5, torch.float32: 2e-3}.get(target.dtype, 0.25)
    gap = float((expected.double() - found.double()).abs().max() / expected.double().std())
    if not gap <= tolerance:
        target.release()
        raise ValueError(
            f"{target.name} ({type(target.model).__name__}) cannot be a target: {what} scored at once differs from the sequential "
            f"text by {gap:.2g} standard deviations of its logits (allowed: {tolerance:g})"
        )
