"""The hook for transformers: `model.generate(ids, custom_generate=headstart.custom_generate)`.

Every argument of `generate` and every setting of a GenerationConfig is honoured, or cannot change the text, or is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from headstart.drafters import Drafter
from headstart.engine.drafter_loading import make, read_planner
from headstart.engine.engine import Engine
from headstart.engine.generate_settings import (
    NOT_HANDED_OVER,
    check_arguments,
    check_processors,
    check_settings,
    not_supported,
    stops_and_limit,
)
from headstart.engine.planning import planner_for
from headstart.engine.scheduler import Request
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Planner
from headstart.speculation.rules import parse_rule
from headstart.target.cache import Seating
from headstart.target.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Streamer(Protocol):
    """A streamer of transformers."""

    def put(self, value: Tensor) -> None:
        """Take the prompt [1, length], or one new token [1]."""
        ...

    def end(self) -> None:
        """Note that no more tokens come."""
        ...


# -- the hook ---------------------------------------------------------------------------------------------------------------


def custom_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    streamer: Streamer | None = None,
    drafter: str | Drafter | None = "lookup",
    planner: Planner | str | None = None,
    exact: bool | str = "auto",
    **rest: Any,
) -> Tensor:
    """The tokens of `model.generate`, from fewer forwards of the model.

    Used as `model.generate(ids, custom_generate=headstart.custom_generate, drafter=...)`. With `do_sample` the seed is drawn from
    torch's default generator, so `torch.manual_seed` repeats an answer.

    input_ids: [batch, length] int64, padded on the left where `attention_mask` is 0.
    logits_processor, stopping_criteria, generation_config: as `generate` hands them over.
    streamer: the one given to `generate`; it takes a batch of one.
    drafter: as `headstart.load` takes it, but "lookup" by default. Heads and draft models are loaded once per model and path.
    planner: as `headstart.load` takes it.
    exact: as in `load`, but the model's linear layers are not packed. Every drafter then gives the same tokens, sampled ones too.
        Compared with `model.generate`, whose kernels differ, a greedy near tie may be decided differently.

    Returns [batch, length + new] int64, padded on the right.
    Raises ValueError for every argument and setting that is not honoured.
    """
    call = _calling_generate(model)
    streamer = streamer or call.get("streamer")
    try:
        return _generate(
            model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, drafter, planner, exact, rest, call
        )
    finally:
        if streamer is not None:  # after an error too: a reader in another thread waits for the end
            streamer.end()


def _generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Streamer | None,
    drafter: str | Drafter | None,
    planner: Planner | str | None,
    exact: bool | str,
    rest: dict[str, Any],
    call: Mapping[str, Any],
) -> Tensor:
    config = generation_config or model.generation_config
    check_arguments(rest, call)
    check_settings(config)
    check_processors(logits_processor, config)
    prompts = _unpadded(input_ids, rest.get("attention_mask"), rest.get("position_ids"))
    stops, limit = stops_and_limit(model, config, stopping_criteria)
    params = _sampling_params(config, input_ids.shape[1], limit)
    chosen = read_planner(planner, drafter, model, params.temperature)
    if not call and (config.num_return_sequences or 1) > 1:
        raise not_supported("num_return_sequences in a direct call", "repeat the rows of input_ids instead")
    if streamer is not None:
        if len(prompts) > 1:
            raise ValueError(f"a streamer takes a batch of one, but there are {len(prompts)} rows; leave it out")
        if not call:
            streamer.put(input_ids.cpu())  # `generate` has done so where it is the caller
    with _LoadedDrafters.of(model).lend(model, drafter, exact) as (target, lent):
        engine = Engine(target, lent, planner_for(target, lent, chosen, parse_rule("coupled")), max_rows=min(8, len(prompts)))
        seeds = torch.randint(0, 2**62, (len(prompts),)).tolist() if params.temperature else [0] * len(prompts)
        requests = [engine.add(ids, params, seed=seed, stop_ids=stops) for ids, seed in zip(prompts, seeds, strict=True)]
        for event in engine.run():
            for token in event.tokens if streamer is not None else ():
                streamer.put(torch.tensor([token]))  # type: ignore[union-attr]
    pad = getattr(config, "pad_token_id", None)
    return _padded(input_ids, requests, pad if pad is not None else (stops[0] if stops else 0))


def _calling_generate(model: PreTrainedModel) -> Mapping[str, Any]:
    """The arguments of the `model.generate` that runs now; empty if the hook was called directly.

    transformers does not hand the streamer and the assistant to the callable, so they are read from the frame of `generate`:
    otherwise they would be ignored without an error.
    """
    from transformers import GenerationMixin

    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("self") is model:
            names = ("streamer", "kwargs", *NOT_HANDED_OVER)
            return {name: frame.f_locals.get(name) for name in names}
        frame = frame.f_back
    return {}


# -- in and out -------------------------------------------------------------------------------------------------------------


def _sampling_params(config: Any, length: int, limit: int | None) -> SamplingParams:
    """The sampling parameters of a GenerationConfig.

    length: of the prompts with their padding.
    limit: largest length of a row, prompt included; None: as the config says.
    """
    if limit is None:
        max_tokens = getattr(config, "max_new_tokens", None) or (config.max_length or 20) - length
    else:
        max_tokens = limit - length
    sampled = bool(config.do_sample)
    temperature = 1.0 if config.temperature is None else float(config.temperature)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature if sampled else 0.0,
        top_k=(config.top_k or None) if sampled else None,
        top_p=config.top_p if sampled else None,
        min_p=getattr(config, "min_p", None) if sampled else None,
        repetition_penalty=config.repetition_penalty or 1.0,
        logit_bias=dict.fromkeys(getattr(config, "suppress_tokens", None) or (), -torch.inf),
    )


def _unpadded(input_ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> list[list[int]]:
    """The prompts without padding.

    mask: attention mask [batch, length], or None: no padding.
    positions: position ids [batch, length], or None.

    Raises ValueError for a mask or positions that are not those of prompts padded on the left.
    """
    keep = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.to(input_ids.device).bool()
    if keep.shape != input_ids.shape:
        raise not_supported(f"attention_mask of shape {list(keep.shape)}", f"give one of shape {list(input_ids.shape)}")
    if not keep[:, -1].all():
        raise not_supported("padding on the right", "set padding_side='left' of the tokenizer")
    if positions is not None:
        expected = keep.long().cumsum(-1) - 1
        if ((positions.to(input_ids.device) != expected) & keep).any():
            raise not_supported("position_ids other than those of the text", "leave them out")
    return [ids[row].tolist() for ids, row in zip(input_ids, keep, strict=True)]


def _padded(input_ids: Tensor, requests: Sequence[Request], pad: int) -> Tensor:
    """The prompts as given, and behind them the outputs, padded on the right: [batch, length + new]."""
    longest = max(len(request.output) for request in requests)
    new = torch.full((len(requests), longest), pad, dtype=input_ids.dtype)
    for row, request in enumerate(requests):
        new[row, : len(request.output)] = torch.tensor(request.output)
    return torch.cat([input_ids, new.to(input_ids.device)], 1)


# -- drafters that are kept between calls -----------------------------------------------------------------------------------


class _LoadedDrafters:
    """The drafters that were loaded for a model, and whether the model has been checked. Copies and pickles of a model have none.

    It is an attribute of the model: drafters refer to their model, so a table elsewhere would keep both for ever.
    """

    def __init__(self) -> None:
        self.lock = RLock()  # one call at a time: a model has one attention function
        self.idle: dict[tuple[object, ...], Drafter] = {}  # by name, versions of its files, device and dtype
        self.is_checked = False

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    @classmethod
    def of(cls, model: PreTrainedModel) -> _LoadedDrafters:
        """The entry of a model, made at its first call."""
        loaded: _LoadedDrafters = model.__dict__.setdefault("_headstart", cls())
        return loaded

    @contextmanager
    def lend(
        self, model: PreTrainedModel, spec: str | Drafter | None, exact: bool | str
    ) -> Iterator[tuple[Target, Drafter | None]]:
        """The model as a target, and the drafter that `spec` names, for one call."""
        with self.lock:
            target = Target(model, check=not self.is_checked)
            self.is_checked = True
            try:
                target.choose_kernels(exact, pack=False)
                if not isinstance(spec, str) or spec == "lookup":  # lookup must not learn from another call
                    yield target, make(spec, target) if isinstance(spec, str) else spec
                    return
                key = (spec, *_versions(spec), target.device, target.dtype)
                drafter = self.idle.pop(key, None) or make(spec, target)
                yield target, drafter
                drafter.attach(target, Seating(1, 1))  # frees its KV cache of this call's size
                self.idle[key] = drafter  # not after an error: its state is then unknown
            finally:
                target.release()


def _versions(spec: str) -> list[tuple[str, int, int]]:
    """Name, time and size of each file in the folder that a drafter is loaded from, so that changed weights are loaded again."""
    folder = Path(spec if Path(spec).is_dir() else spec.partition(":")[2] or "/nowhere")
    if not folder.is_dir():
        return []
    files = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    return [(name, stat.st_mtime_ns, stat.st_size) for name, stat in files]
