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
from headstart.engine.scheduler import Request
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Planner
from headstart.target.cache import Seating
from headstart.target.target import Target
from headstart.text.tokenizer import stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# -- the settings of a GenerationConfig -------------------------------------------------------------------------------------

HONOURED = frozenset(
    (
        "do_sample",
        "eos_token_id",
        "max_length",
        "max_new_tokens",
        "min_p",
        "num_return_sequences",  # `generate` has repeated the rows
        "pad_token_id",
        "repetition_penalty",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
    )
)

# Settings that cannot change the text here, and why.
UNCHANGING = {
    # beam search is refused
    "early_stopping": "of beam search",
    "length_penalty": "of beam search",
    # assistants are refused
    "assistant_confidence_threshold": "of assistants",
    "assistant_lookbehind": "of assistants",
    "max_matching_ngram_size": "of assistants",
    "num_assistant_tokens": "of assistants",
    "num_assistant_tokens_schedule": "of assistants",
    "target_lookbehind": "of assistants",
    # the engine has a cache and kernels of its own
    "cache_config": "of quantized caches, which are refused",
    "compile_config": "how a forward runs",
    "disable_compile": "how a forward runs",
    "max_cache_len": "size of a cache",
    "prefill_chunk_size": "how a prompt is read",
    "use_cache": "how a forward runs",
    # others
    "bos_token_id": "`generate` has put it into an empty prompt",
    "continuous_batching_config": "of generate_batch",
    "decoder_start_token_id": "of encoder-decoder models",
    "low_memory": "of contrastive search, which is refused",
    "renormalize_logits": "the distribution is the same",
    "transformers_version": "a note",
}

# Settings that change the text or what is returned and are not honoured, with the values that switch each off.
REFUSED: dict[str, tuple[object, ...]] = {
    "assistant_early_exit": (None,),
    "assistant_ensemble_weight": (None,),
    "bad_words_ids": (None,),
    "begin_suppress_tokens": (None,),
    "cache_implementation": (None, "dynamic", "static"),
    "constraints": (None,),
    "diversity_penalty": (0.0, None),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (0, None),
    "encoder_repetition_penalty": (1.0, None),
    "epsilon_cutoff": (0.0, None),
    "eta_cutoff": (0.0, None),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1.0),
    "is_assistant": (None, False),
    "max_time": (None,),
    "min_new_tokens": (None, 0),  # before min_length, which `generate` makes of it
    "min_length": (0, None),
    "no_repeat_ngram_size": (0, None),
    "num_beam_groups": (1, None),
    "num_beams": (1, None),
    "output_attentions": (False, None),
    "output_hidden_states": (False, None),
    "output_logits": (False, None),
    "output_scores": (False, None),
    "penalty_alpha": (None, 0.0),
    "prompt_lookup_num_tokens": (None,),
    "remove_invalid_values": (False, None),
    "return_dict_in_generate": (False, None),
    "sequence_bias": (None,),
    "speculation_type": (None,),
    "stop_strings": (None,),
    "token_healing": (False, None),
    "top_h": (None,),
    "typical_p": (1.0, None),
    "use_mtp": (None, False),
    "watermarking_config": (None,),
}

# What to do instead, where it is more than leaving a setting out.
_INSTEAD = {
    "prompt_lookup_num_tokens": "drafter='lookup' does the same, and is the default",
    "use_mtp": "pass drafter='mtp'",
    "assistant_model": "pass drafter='model:PATH'",
}

# Keyword arguments that every call of `generate` hands over. Their values are looked at where they could change the text.
_USUAL = frozenset(("attention_mask", "cache_position", "logits_to_keep", "past_key_values", "position_ids", "use_cache"))

# Arguments of `generate` itself, which it does not hand to a callable.
_KEPT_BACK = ("assistant_model", "negative_prompt_ids", "negative_prompt_attention_mask", "synced_gpus")


class Streamer(Protocol):
    """A streamer of transformers."""

    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...


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
    """`model.generate(ids, custom_generate=headstart.custom_generate, drafter=...)`: the same tokens in fewer passes.

    input_ids: [batch, length], padded on the left where `attention_mask` is 0.
    drafter, planner: as `headstart.load` takes them. Heads and draft models are loaded once per model and path.
    streamer: given to `generate`; it takes a batch of one.
    exact: as in `load`, but the model's linears are not packed. Any drafter then gives the same tokens, also sampled ones. Beside
        `model.generate` itself, whose kernels are others, a greedy near tie may fall otherwise.
    With `do_sample` the seed is drawn from torch's default generator, so `torch.manual_seed` repeats an answer.
    Returns [batch, length + new], padded on the right. Raises ValueError for every argument and setting that is not honoured.
    """
    call = _calling_generate(model)
    streamer = streamer or call.get("streamer")
    try:
        return _generate(
            model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, drafter, planner, exact, rest, call
        )
    finally:
        if streamer is not None:  # also after an error: nobody waits for ever for the end of a stream
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
    _check_arguments(rest, call)
    check_settings(config)
    _check_processors(logits_processor, config)
    prompts = _unpadded(input_ids, rest.get("attention_mask"), rest.get("position_ids"))
    stops, limit = _ends(model, config, stopping_criteria)
    params = _sampling_params(config, input_ids.shape[1], limit)
    planner = read_planner(planner, drafter, params.temperature)
    if not call and (config.num_return_sequences or 1) > 1:
        raise _not_supported("num_return_sequences in a direct call", "repeat the rows of input_ids instead")
    if streamer is not None:
        if len(prompts) > 1:
            raise ValueError(f"a streamer takes a batch of one, but there are {len(prompts)} rows; leave it out")
        if not call:
            streamer.put(input_ids.cpu())  # `generate` itself has done so
    with _LoadedDrafters.of(model).lend(model, drafter, exact) as (target, lent):
        engine = Engine(target, lent, planner, max_rows=min(8, len(prompts)))
        seeds = torch.randint(0, 2**62, (len(prompts),)).tolist() if params.temperature else [0] * len(prompts)
        requests = [engine.add(ids, params, seed=seed, stop_ids=stops) for ids, seed in zip(prompts, seeds, strict=True)]
        for event in engine.run():
            for token in event.tokens if streamer is not None else ():
                streamer.put(torch.tensor([token]))  # type: ignore[union-attr]
    pad = getattr(config, "pad_token_id", None)
    return _padded(input_ids, requests, pad if pad is not None else (stops[0] if stops else 0))


def _calling_generate(model: PreTrainedModel) -> Mapping[str, Any]:
    """The arguments of the `model.generate` that runs now; empty if the hook was called directly.

    transformers hands a callable neither the streamer nor the assistant that `generate` was given, so they are read from its
    frame: otherwise they would be ignored without a word.
    """
    from transformers import GenerationMixin

    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("self") is model:
            names = ("streamer", "kwargs", *_KEPT_BACK)
            return {name: frame.f_locals.get(name) for name in names}
        frame = frame.f_back
    return {}


# -- what is refused --------------------------------------------------------------------------------------------------------


def _check_arguments(rest: Mapping[str, Any], call: Mapping[str, Any]) -> None:
    for name in _KEPT_BACK:
        if call.get(name) is not None and call[name] is not False:
            raise _not_supported(f"argument {name}", _INSTEAD.get(name, "leave it out"))
    if (call and call["kwargs"].get("past_key_values") is not None) or _is_used(rest.get("past_key_values")):
        raise _not_supported("argument past_key_values", "leave it out; the engine has a cache of its own")
    for name, value in rest.items():
        if name not in _USUAL and value is not None and value is not False:
            raise _not_supported(f"argument {name}", _INSTEAD.get(name, "leave it out"))


def _is_used(cache: Any) -> bool:
    """Whether a cache holds something, or is its caller's; `generate` makes an empty one for every call."""
    if cache is None:
        return False
    return not hasattr(cache, "get_seq_length") or cache.get_seq_length() > 0 or getattr(cache, "_is_user_defined", False)


def check_settings(config: Any) -> None:
    """Raise ValueError if a GenerationConfig says something that would be ignored.

    A field that this version of headstart does not know is refused unless it has its default value. Entries that are no fields of
    GenerationConfig mean nothing to `generate` either.
    """
    defaults = config._get_default_generation_params()
    unknown = {name: default for name, default in vars(type(config)()).items() if not _is_known(name)}
    off = REFUSED | {name: (default, defaults.get(name)) for name, default in unknown.items()}
    for name, values in off.items():
        given = getattr(config, name, values[0])
        if not any(given is value or given == value for value in values):
            raise _not_supported(f"generation setting {name}={given}", _INSTEAD.get(name, f"set it to {values[0]}"))


def _is_known(name: str) -> bool:
    return name.startswith("_") or name in HONOURED or name in UNCHANGING or name in REFUSED


def _check_processors(processors: Any, config: Any) -> None:
    """Raise ValueError for a logits processor that does other than what the settings say."""
    seen: set[type] = set()
    for step in processors or ():
        kind = type(step)
        attribute, setting = _PROCESSORS.get(kind.__name__, ("", ""))
        is_own = kind.__module__.startswith("transformers.") and kind not in seen
        if not setting or not is_own or not _same(getattr(step, attribute), getattr(config, setting)):
            instead = f"give {setting} to generate instead" if setting else "leave it out"
            raise _not_supported(f"logits processor {kind.__name__}", instead)
        if isinstance(getattr(step, "prompt_ignore_length", None), int):
            raise _not_supported("prompt_ignore_length of RepetitionPenaltyLogitsProcessor", "leave it out")
        seen.add(kind)


# The processors that `generate` makes of settings that are honoured or change nothing: what each keeps, and of which setting.
_PROCESSORS = {
    "TemperatureLogitsWarper": ("temperature", "temperature"),
    "TopKLogitsWarper": ("top_k", "top_k"),
    "TopPLogitsWarper": ("top_p", "top_p"),
    "MinPLogitsWarper": ("min_p", "min_p"),
    "RepetitionPenaltyLogitsProcessor": ("penalty", "repetition_penalty"),
    "SuppressTokensLogitsProcessor": ("suppress_tokens", "suppress_tokens"),
    "LogitNormalization": ("__class__", "renormalize_logits"),
}


def _same(kept: Any, setting: Any) -> bool:
    if isinstance(kept, type):  # LogitNormalization keeps nothing
        return setting is True
    if isinstance(kept, Tensor):
        return setting is not None and kept.tolist() == list(setting)
    return bool(kept == setting)


def _ends(model: PreTrainedModel, config: Any, criteria: Any) -> tuple[tuple[int, ...], int | None]:
    """The stop tokens, and how long a row becomes at most with its prompt (None: as the config says).

    `generate` always hands over criteria, which say both; they may be the caller's own. Raises ValueError for any other.
    """
    if criteria is None:
        return stop_token_ids(None, config, model.config), None
    stops: list[int] = []
    limits: list[int] = []
    for step in criteria:
        kind = type(step)
        if not kind.__module__.startswith("transformers.") or kind.__name__ not in ("MaxLengthCriteria", "EosTokenCriteria"):
            raise _not_supported(f"stopping criterion {kind.__name__}", "leave it out")
        if kind.__name__ == "EosTokenCriteria":
            stops += step.eos_token_id.flatten().tolist()
        else:
            limits.append(int(step.max_length))
    return tuple(dict.fromkeys(stops)), min(limits, default=None)


def _not_supported(what: str, instead: str) -> ValueError:
    return ValueError(f"{what} is not supported by headstart.custom_generate; {instead}")


# -- in and out -------------------------------------------------------------------------------------------------------------


def _sampling_params(config: Any, length: int, limit: int | None) -> SamplingParams:
    """length: of the prompts with their padding. limit: of the rows, prompt included."""
    if limit is None:
        left = getattr(config, "max_new_tokens", None) or (config.max_length or 20) - length
    else:
        left = limit - length
    sampled = bool(config.do_sample)
    temperature = 1.0 if config.temperature is None else float(config.temperature)
    return SamplingParams(
        max_tokens=left,
        temperature=temperature if sampled else 0.0,
        top_k=(config.top_k or None) if sampled else None,
        top_p=config.top_p if sampled else None,
        min_p=getattr(config, "min_p", None) if sampled else None,
        repetition_penalty=config.repetition_penalty or 1.0,
        logit_bias=dict.fromkeys(getattr(config, "suppress_tokens", None) or (), -torch.inf),
    )


def _unpadded(input_ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> list[list[int]]:
    """The prompts without padding. Raises ValueError for a mask or positions that say more than where padding is."""
    keep = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.to(input_ids.device).bool()
    if keep.shape != input_ids.shape:
        raise _not_supported(f"attention_mask of shape {list(keep.shape)}", f"give one of shape {list(input_ids.shape)}")
    if not keep[:, -1].all():
        raise _not_supported("padding on the right", "set padding_side='left' of the tokenizer")
    if positions is not None:
        usual = keep.long().cumsum(-1) - 1
        if ((positions.to(input_ids.device) != usual) & keep).any():
            raise _not_supported("position_ids other than those of the text", "leave them out")
    return [ids[row].tolist() for ids, row in zip(input_ids, keep, strict=True)]


def _padded(input_ids: Tensor, requests: Sequence[Request], pad: int) -> Tensor:
    longest = max(len(request.output) for request in requests)
    new = torch.full((len(requests), longest), pad, dtype=input_ids.dtype)
    for row, request in enumerate(requests):
        new[row, : len(request.output)] = torch.tensor(request.output)
    return torch.cat([input_ids, new.to(input_ids.device)], 1)


# -- what a model keeps from call to call -----------------------------------------------------------------------------------


class _LoadedDrafters:
    """The drafters that were loaded for a model, and whether it has been checked; copies and pickles of a model start anew.

    It lives in the model's own dictionary: drafters refer to their model, so that a table outside would keep both for ever.
    """

    def __init__(self) -> None:
        self.lock = RLock()  # one call at a time: a model has one attention function
        self.idle: dict[tuple[object, ...], Drafter] = {}
        self.is_checked = False

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    @classmethod
    def of(cls, model: PreTrainedModel) -> _LoadedDrafters:
        found: _LoadedDrafters = model.__dict__.setdefault("_headstart", cls())
        return found

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
                if not isinstance(spec, str) or spec == "lookup":  # lookup learns from one call only
                    yield target, make(spec, target) if isinstance(spec, str) else spec
                    return
                key = (spec, *_versions(spec), target.device, target.dtype)
                drafter = self.idle.pop(key, None) or make(spec, target)
                yield target, drafter
                drafter.attach(target, Seating(1, 1))  # so that it keeps no memory of this call's size
                self.idle[key] = drafter  # not after an error: it may be in any state
            finally:
                target.release()


def _versions(spec: str) -> list[tuple[str, int, int]]:
    """Name, time and size of the files of the folder that a drafter is loaded from: weights that changed are loaded again."""
    folder = Path(spec if Path(spec).is_dir() else spec.partition(":")[2] or "/nowhere")
    if not folder.is_dir():
        return []
    facts = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    return [(name, fact.st_mtime_ns, fact.st_size) for name, fact in facts]
