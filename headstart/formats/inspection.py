"""What a folder holds: a model, with what prevents serving it, or heads. Must not import engine, training, bench or cli."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.formats.detect import Detected, detect

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headstart.target.row_mask import Window
    from headstart.target.target import Target


def inspect_folder(path: str, device: str = "auto", trust_remote_code: bool = False) -> dict[str, Any]:
    """Everything that `headstart inspect` prints, by name.

    path: a folder or hub id of a model, or a folder of heads.
    device: where the model is loaded: auto, cpu, cuda, ...
    trust_remote_code: let Python files in the model's folder run.
    The entry `problems` lists what prevents serving exactly; `refusal`, where there is one, is why a model cannot be a target.
    Raises ValueError where there is neither a model that can be loaded nor heads.
    """
    detected = _detected(path)
    if detected is not None and not detected.is_target:
        return _heads(path, detected)
    model = _model(path, device, trust_remote_code)
    problems = [*model["problems"], *(detected.problems if detected else ())]
    return model | _heads_inside(path, detected) | {"problems": problems}


def _detected(path: str) -> Detected | None:
    """None for what is not on this disk or not known: loading it as a model says what is wrong with it."""
    detected = detect(path) if Path(path).exists() else None
    return None if detected is None or detected.kind == "unknown" else detected


def _heads(path: str, detected: Detected) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(detected).items() if value not in (None, ()) and name != "is_target"}
    return {"path": path} | fields | {"notes": list(detected.notes), "problems": list(detected.problems)}


def _heads_inside(path: str, detected: Detected | None) -> dict[str, Any]:
    """Heads in the same files as a model, with the commands that use and import them, and the notes on them."""
    if detected is None:
        return {}
    notes = {"notes": list(detected.notes)} if detected.notes else {}
    if detected.kind == "target":
        return notes
    counts = {"num_heads": detected.num_heads, "num_modules": detected.num_modules}
    heads = {"heads": detected.layout, **{name: count for name, count in counts.items() if count is not None}}
    if detected.command is None:
        return heads | notes
    use = f"headstart generate --model {path} --drafter {detected.method}"
    return heads | {"draft": use, "import": detected.command} | notes


def _model(path: str, device: str, trust_remote_code: bool) -> dict[str, Any]:
    from headstart.target.loading import digest, load_model

    model = load_model(path, "auto", device, trust_remote_code)
    text_config = model.config.get_text_config()
    sizes = {
        "path": path,
        "kind": "target",
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": int(text_config.num_hidden_layers),
        "hidden": int(text_config.hidden_size),
        "vocab": int(text_config.vocab_size),
        "digest": digest(model),
    }
    problems: list[str] = []
    return sizes | _target(model, problems) | _tokenizer(path, model, problems, trust_remote_code) | {"problems": problems}


def _target(model: PreTrainedModel, problems: list[str]) -> dict[str, Any]:
    """Context, attention windows, KV cache and exactness. Where the model cannot be a target: the reason alone, as `refusal`.

    problems: what prevents serving is added here, the reason of a refusal included.
    """
    from headstart.target.target import Target

    try:
        target = Target(model)
        target.choose_kernels()
    except ValueError as error:
        problems.append(str(error))
        return {"refusal": str(error)}
    problems += _limits(target)
    return {
        "context": target.context,
        "reach": [_window(window) for window in target.windows],
        "cache_bytes_per_token": target.slot_bytes,
        "exact": _exactness(target),
    }


def _limits(target: Target) -> list[str]:
    """What was not checked, and a context that is shorter than the configuration's."""
    from headstart.target.selfcheck import MAX_CHECK

    longest = max((window.sliding or window.chunk or 0 for window in target.windows), default=0)
    declared = int(getattr(target.model.config.get_text_config(), "max_position_embeddings", target.context))
    limits = []
    if longest > MAX_CHECK:
        limits.append(f"the self-check reads {MAX_CHECK} tokens at most and did not go beyond the window of {longest}")
    if target.context < declared:
        limits.append(f"the context is {target.context} of {declared}: beyond it, positions would change with other rows")
    return limits


def _exactness(target: Target) -> str:
    """Whether speculative decoding equals plain decoding to the bit on this device, by default."""
    choice = target.kernel_choice
    assert choice is not None, "call choose_kernels of the target first"
    return "to the bit" if choice.is_exact else f"up to near ties: {choice.why_not}"


def _window(window: Window) -> str:
    if window.sliding is not None:
        return f"window of {window.sliding}"
    return "everything" if window.chunk is None else f"chunk of {window.chunk}"


def _tokenizer(path: str, model: PreTrainedModel, problems: list[str], trust_remote_code: bool) -> dict[str, Any]:
    from headstart.target.tokenizer_loading import load_tokenizer
    from headstart.text.tokenizer import stop_token_ids

    try:
        tokenizer = load_tokenizer(path, trust_remote_code)
    except ValueError as error:
        problems.append(str(error))
        return {"tokenizer": None}
    stops = stop_token_ids(tokenizer, model.generation_config, model.config)
    if len(tokenizer) > int(model.config.get_text_config().vocab_size):
        problems.append(f"the tokenizer has {len(tokenizer)} tokens, more than the model's vocabulary")
    return {
        "tokenizer": type(tokenizer).__name__,
        "chat_template": tokenizer.chat_template is not None,
        "stop_tokens": {str(tokenizer.convert_ids_to_tokens(token)): token for token in stops},
    }
