"""transformers' own `generate` as runs: plain, with prompt lookup, and with an assistant model, on the same weights and prompts.

The weights are loaded a second time, as transformers loads them, so that none of this package's kernels is in them. All peers of a
target share that copy.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from headstart.bench.samples import Sample, Setup
from headstart.engine.stats import Part, Stats
from headstart.engine.waiting import Watch
from headstart.speculation.params import SamplingParams
from headstart.target.config import require_two_tokens
from headstart.target.loading import load_model
from headstart.target.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "transformers"
LOOKUP_TOKENS = 10  # drafts of prompt lookup, as in the documentation of transformers

_COPIES: WeakKeyDictionary[Target, PreTrainedModel] = WeakKeyDictionary()


@dataclass(frozen=True)
class Peer:
    """A run of `generate`.

    name: `transformers`, `transformers:lookup` or `transformers:model:PATH`.
    model: the copy of the target.
    settings: of `generate`, for its kind of drafting; empty for plain decoding.
    memory: bytes of the assistant's weights ("heads"), of keys and values of the longest request ("cache"), and of the copy of the
        target ("copy").
    """

    name: str
    model: PreTrainedModel
    settings: dict[str, Any]
    memory: dict[str, int]

    def answers(self, setup: Setup, tasks: Sequence[int]) -> list[Sample]:
        """The timed answers to the tasks of these indices, one after the other."""
        return [self._answer(setup, task) for task in tasks]

    @torch.inference_mode()
    def _answer(self, setup: Setup, task: int) -> Sample:
        params, streamer, watch = setup.params_of(task), _Streamer(is_drafting=bool(self.settings)), Watch()
        ids = torch.tensor([setup.tasks[task].prompt], device=self.model.device)
        settings = {**_generation_settings(params, setup.stop_ids), **self.settings}
        torch.manual_seed(params.seed or 0)
        began = time.perf_counter()
        with streamer.forwards_of(self.model):
            generate: Any = self.model.generate
            output = generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **settings)
        seconds, delay = time.perf_counter() - began, watch.delay()
        tokens, first = tuple(output[0, ids.shape[1] :].tolist()), streamer.arrivals[0] - began
        return Sample(self.name, task, tokens, seconds, first, Stats.of(streamer.parts[1:]), delay, first, streamer.bursts)


# -- reading names ----------------------------------------------------------------------------------------------------------


def is_peer(run: str) -> bool:
    """Whether a run is one of transformers."""
    return run.partition("@")[0].partition(":")[0] == NAME


def check_spec(run: str, planner: object) -> None:
    """Raise ValueError for a peer that there is not, and for one with a planner."""
    kind, _, path = run.removeprefix(NAME).removeprefix(":").partition(":")
    if planner is not None:
        raise ValueError(f"run {run!r} has a planner, which transformers does not read; leave it out")
    if not (run in (NAME, f"{NAME}:lookup") or (kind == "model" and path)):
        raise ValueError(f"run {run!r} is unknown; of transformers there are {NAME}, {NAME}:lookup and {NAME}:model:PATH")


def check_settings(params: SamplingParams, *, is_replay: bool = False, rows: int = 1, weights: str = "stored") -> None:
    """Raise ValueError for what `generate` cannot honour, or not at several rows. weights: as `Target.load` takes them."""
    for name, is_set, way_out in (
        ("--replay", is_replay, "leave it out"),
        (f"--rows {rows}", rows > 1, "leave it out"),
        (f"--weights {weights}", weights != "stored", "leave it out"),
        ("a presence or frequency penalty", params.presence_penalty or params.frequency_penalty, "use --repetition-penalty"),
    ):
        if is_set:
            raise ValueError(f"the runs of {NAME} cannot be measured with {name}; {way_out}, or leave out those runs")


# -- loading ----------------------------------------------------------------------------------------------------------------


def load(run: str, setup: Setup) -> Peer:
    """A peer of the target. Raises ValueError as the checks do, and where a model cannot be loaded."""
    check_spec(run, None)
    check_settings(setup.params, is_replay=setup.is_replay, rows=setup.rows)
    target = setup.target
    if target not in _COPIES:
        _COPIES[target] = _loaded(target.name, target)
    model, path = _COPIES[target], run.removeprefix(f"{NAME}:model:")
    memory = {"heads": 0, "cache": setup.longest * target.slot_bytes, "copy": _bytes(model)}
    if run == NAME:
        return Peer(run, model, {}, memory)
    if run == f"{NAME}:lookup":
        return Peer(run, model, {"prompt_lookup_num_tokens": LOOKUP_TOKENS}, memory)
    assistant = _loaded(path, target)
    memory |= {"heads": _bytes(assistant), "cache": memory["cache"] + setup.longest * _slot_bytes(assistant)}
    return Peer(run, model, {"assistant_model": assistant}, memory)


def _loaded(path: str, target: Target) -> PreTrainedModel:
    """A model as transformers loads it, in the target's dtype and on its device, without sampling settings of its own."""
    from transformers import GenerationConfig

    model = load_model(path, target.dtype, str(target.device), target.trust_remote_code)
    model.eval()
    require_two_tokens(getattr(model.config.get_text_config(), "max_position_embeddings", None), path)
    model.generation_config = GenerationConfig()
    return model


def _bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _slot_bytes(model: PreTrainedModel) -> int:
    """Bytes of keys and values per token."""
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)


def _generation_settings(params: SamplingParams, stop_ids: Sequence[int]) -> dict[str, Any]:
    """The settings of `generate` that mean the same."""
    stops = sorted({*(() if params.ignore_eos else stop_ids), *params.stop_token_ids})
    settings: dict[str, Any] = {"max_new_tokens": params.max_tokens, "do_sample": params.temperature > 0, "pad_token_id": 0}
    if stops:
        settings["eos_token_id"] = stops
    if params.temperature > 0:
        settings |= {"temperature": params.temperature, "top_k": params.top_k or 0, "top_p": params.top_p, "min_p": params.min_p}
    if params.repetition_penalty != 1:
        settings["repetition_penalty"] = params.repetition_penalty
    return {name: value for name, value in settings.items() if value is not None}


# -- watching ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Streamer:
    """A streamer that notes when tokens came, and what the forwards before them cost.

    is_drafting: whether the time between tokens and the next forward is spent on drafts.
    arrivals: when the tokens of each round came.
    parts: each round's part, as an engine's.
    """

    is_drafting: bool
    arrivals: list[float] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    _nodes: int = 0
    _forward: tuple[float, float] = (0.0, 0.0)  # when the last forward began and ended
    _is_prompt: bool = True

    @property
    def bursts(self) -> tuple[tuple[int, float], ...]:
        """As in `Sample`."""
        gaps = [now - before for before, now in zip(self.arrivals, self.arrivals[1:], strict=False)]
        return tuple((part.tokens, gap) for part, gap in zip(self.parts[1:], gaps, strict=True))

    @contextmanager
    def forwards_of(self, model: PreTrainedModel) -> Iterator[None]:
        """A context that times the model's forwards."""

        def begin(module: object, args: object, inputs: dict[str, Any]) -> None:
            ids: Tensor = inputs["input_ids"]
            self._nodes, self._forward = ids.shape[1], (time.perf_counter(), 0.0)

        def end(module: object, args: object, output: object) -> None:
            self._forward = (self._forward[0], time.perf_counter())

        hooks = [model.register_forward_pre_hook(begin, with_kwargs=True), model.register_forward_hook(end)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt, then with the tokens of each round."""
        if self._is_prompt:
            self._is_prompt = False
            return
        now, last = time.perf_counter(), self.arrivals[-1] if self.arrivals else self._forward[0]
        waited = self._forward[0] - last
        seconds = {
            "draft": waited if self.is_drafting else 0.0,
            "score": self._forward[1] - self._forward[0],
            "verify": now - self._forward[1],
            "commit": 0.0,
            "host": 0.0 if self.is_drafting else waited,
        }
        drafts, tokens = self._nodes - 1, value.numel()
        self.parts.append(Part(self._nodes, drafts, drafts, min(tokens - 1, drafts), tokens, seconds))
        self.arrivals.append(now)

    def end(self) -> None:
        """Called by `generate` at the end."""
