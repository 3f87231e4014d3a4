"""Which arguments and settings of transformers' `generate` are honoured, cannot change the text, or are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from headstart.text.tokenizer import stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# -- the lists --------------------------------------------------------------------------------------------------------------

# Settings of a GenerationConfig that have the effect that they have in `generate`.
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

# Settings that cannot change the text here, each with the reason.
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
    # the engine has its own KV cache and kernels
    "cache_config": "of quantized KV caches, which are refused",
    "compile_config": "how a forward runs",
    "disable_compile": "how a forward runs",
    "max_cache_len": "size of a KV cache",
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

# Settings that change the text or the return value and are not honoured, each with the values that switch it off.
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

# What to do instead of using a setting, where leaving it out is not enough.
_INSTEAD = {
    "prompt_lookup_num_tokens": "drafter='lookup' does the same, and is the default",
    "use_mtp": "pass drafter='mtp'",
    "assistant_model": "pass drafter='model:PATH'",
}

# Keyword arguments that `generate` hands to the callable in every call. Values that could change the text are checked apart.
_ALWAYS_HANDED_OVER = frozenset(
    ("attention_mask", "cache_position", "logits_to_keep", "past_key_values", "position_ids", "use_cache")
)

# Arguments of `generate` that it does not hand to the callable.
NOT_HANDED_OVER = ("assistant_model", "negative_prompt_ids", "negative_prompt_attention_mask", "synced_gpus")


# -- the checks -------------------------------------------------------------------------------------------------------------


def check_arguments(rest: Mapping[str, Any], call: Mapping[str, Any]) -> None:
    """Raise ValueError for an argument that would be ignored.

    rest: keyword arguments that the callable got and does not name.
    call: arguments of the running `model.generate`; empty in a direct call.
    """
    for name in NOT_HANDED_OVER:
        if call.get(name) is not None and call[name] is not False:
            raise not_supported(f"argument {name}", _INSTEAD.get(name, "leave it out"))
    if (call and call["kwargs"].get("past_key_values") is not None) or _is_used(rest.get("past_key_values")):
        raise not_supported("argument past_key_values", "leave it out; the engine has its own KV cache")
    for name, value in rest.items():
        if name not in _ALWAYS_HANDED_OVER and value is not None and value is not False:
            raise not_supported(f"argument {name}", _INSTEAD.get(name, "leave it out"))


def _is_used(cache: Any) -> bool:
    """Whether a KV cache holds tokens or was made by the caller. `generate` makes an empty one for every call."""
    if cache is None:
        return False
    return not hasattr(cache, "get_seq_length") or cache.get_seq_length() > 0 or getattr(cache, "_is_user_defined", False)


def check_settings(config: Any) -> None:
    """Raise ValueError for a GenerationConfig with a setting that would be ignored.

    A field that is in none of the lists is refused unless it has its default value. Entries that are not fields of
    GenerationConfig have no effect in `generate` either and pass.
    """
    defaults = config._get_default_generation_params()
    unknown = {name: default for name, default in vars(type(config)()).items() if not _is_known(name)}
    off = REFUSED | {name: (default, defaults.get(name)) for name, default in unknown.items()}
    for name, values in off.items():
        setting = getattr(config, name, values[0])
        if not any(setting is value or setting == value for value in values):
            raise not_supported(f"generation setting {name}={setting}", _INSTEAD.get(name, f"set it to {values[0]}"))


def _is_known(name: str) -> bool:
    return name.startswith("_") or name in HONOURED or name in UNCHANGING or name in REFUSED


def check_processors(processors: Any, config: Any) -> None:
    """Raise ValueError for a logits processor that is not the one that `generate` makes for a setting of `config`."""
    checked: set[type] = set()
    for step in processors or ():
        kind = type(step)
        attribute, setting = _PROCESSORS.get(kind.__name__, ("", ""))
        is_from_setting = kind.__module__.startswith("transformers.") and kind not in checked
        if not setting or not is_from_setting or not _is_same(getattr(step, attribute), getattr(config, setting)):
            instead = f"give {setting} to generate instead" if setting else "leave it out"
            raise not_supported(f"logits processor {kind.__name__}", instead)
        if isinstance(getattr(step, "prompt_ignore_length", None), int):
            raise not_supported("prompt_ignore_length of RepetitionPenaltyLogitsProcessor", "leave it out")
        checked.add(kind)


# Logits processors that `generate` makes for settings that are honoured or change nothing: the attribute that holds the value,
# and the setting that it comes from.
_PROCESSORS = {
    "TemperatureLogitsWarper": ("temperature", "temperature"),
    "TopKLogitsWarper": ("top_k", "top_k"),
    "TopPLogitsWarper": ("top_p", "top_p"),
    "MinPLogitsWarper": ("min_p", "min_p"),
    "RepetitionPenaltyLogitsProcessor": ("penalty", "repetition_penalty"),
    "SuppressTokensLogitsProcessor": ("suppress_tokens", "suppress_tokens"),
    "LogitNormalization": ("__class__", "renormalize_logits"),
}


def _is_same(kept: Any, setting: Any) -> bool:
    if isinstance(kept, type):  # LogitNormalization holds no value
        return setting is True
    if isinstance(kept, Tensor):
        return setting is not None and kept.tolist() == list(setting)
    return bool(kept == setting)


def stops_and_limit(model: PreTrainedModel, config: Any, criteria: Any) -> tuple[tuple[int, ...], int | None]:
    """The stop tokens, and the largest length of a row, prompt included (None: the length that the config has).

    criteria: None in a direct call; `generate` always makes criteria for both.

    Raises ValueError for a criterion of another kind.
    """
    if criteria is None:
        return stop_token_ids(None, config, model.config), None
    stops: list[int] = []
    limits: list[int] = []
    for step in criteria:
        kind = type(step)
        if not kind.__module__.startswith("transformers.") or kind.__name__ not in ("MaxLengthCriteria", "EosTokenCriteria"):
            raise not_supported(f"stopping criterion {kind.__name__}", "leave it out")
        if kind.__name__ == "EosTokenCriteria":
            stops += step.eos_token_id.flatten().tolist()
        else:
            limits.append(int(step.max_length))
    return tuple(dict.fromkeys(stops)), min(limits, default=None)


def not_supported(what: str, instead: str) -> ValueError:
    """The error for an argument or a setting that is refused, with what to do instead."""
    return ValueError(f"{what} is not supported by headstart.custom_generate; {instead}")
