"""`inspect`: what a folder holds, and what would stand in the way of serving it exactly."""

import json as json_format
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli.options import Json, Trust, quieten, waiting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headstart.formats import Detected
    from headstart.target.attention import Window
    from headstart.target.target import Target


def inspect(
    path: Annotated[
        str | None, typer.Argument(help="Folder of a model or of heads, or a hub id.", show_default="the embedded model")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to try it: auto, cpu, cuda, ...")] = "auto",
    model: Annotated[
        str | None, typer.Option(help="With --probe: the model that the heads shall work for.", show_default="embedded")
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Decode a few prompts with these heads, and say how they fare.")] = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Say what a folder holds.

    Of a model: sizes, context, cache, tokenizer, fingerprint, and problems that stand in the way of serving it exactly.
    Of heads, ours or published by others: method, sizes, their model, and the command that uses them or brings them in.

    Example: headstart inspect ./talk13M --json
    """
    from headstart.target.loading import embedded

    if model is not None and not probe:
        raise ValueError("--model names the model that heads are tried on; add --probe, or leave it out")
    place = path or str(embedded("target"))
    with waiting(f"loading {place}"):
        found = describe(place, device, trust_remote_code)
    if probe:
        found |= {"probe": _probed(place, model, device, trust_remote_code)}
    refusal = found.pop("refusal", None)
    if json:
        print(json_format.dumps(found))
    else:
        _print(found)
    if refusal is not None:
        raise ValueError(refusal)


def _probed(path: str, model: str | None, device: str, trust_remote_code: bool) -> dict[str, Any]:
    from headstart.cli.calibrate import probe
    from headstart.formats import describe

    describe(path)  # which refuses what holds no heads of ours
    return probe(path, model, device, trust_remote_code)


def describe(path: str, device: str = "auto", trust_remote_code: bool = False) -> dict[str, Any]:
    """Everything `inspect` says; `refusal` is why a model cannot be a target, where it cannot.

    Raises ValueError where there is neither a model that can be loaded nor heads.
    """
    quieten()
    known = _detected(path)
    if known is not None and not known.is_target:
        return _of_heads(path, known)
    model = _of_model(path, device, trust_remote_code)
    return model | _inside(path, known) | {"problems": [*model["problems"], *(known.problems if known else ())]}


def _detected(path: str) -> "Detected | None":
    """None for what is not here or not known: loading it as a model says what is wrong with it."""
    from headstart.formats import detect

    known = detect(path) if Path(path).exists() else None
    return None if known is None or known.kind == "unknown" else known


def _of_heads(path: str, known: "Detected") -> dict[str, Any]:
    found = {name: value for name, value in asdict(known).items() if value not in (None, ()) and name != "is_target"}
    return {"path": path} | found | {"notes": list(known.notes), "problems": list(known.problems)}


def _inside(path: str, known: "Detected | None") -> dict[str, Any]:
    """Heads in the same files as a model, or what is said of them."""
    if known is None:
        return {}
    notes = {"notes": list(known.notes)} if known.notes else {}
    if known.kind == "target":
        return notes
    counts = {"num_heads": known.num_heads, "num_modules": known.num_modules}
    found = {"heads": known.layout, **{name: count for name, count in counts.items() if count is not None}}
    if known.command is None:
        return found | notes
    return found | {"draft": f"headstart generate --model {path} --drafter {known.method}", "import": known.command} | notes


def _of_model(path: str, device: str, trust_remote_code: bool) -> dict[str, Any]:
    from headstart.target.loading import digest, load_model

    model = load_model(path, "auto", device, trust_remote_code)
    text = model.config.get_text_config()
    found = {
        "path": path,
        "kind": "target",
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": int(text.num_hidden_layers),
        "hidden": int(text.hidden_size),
        "vocab": int(text.vocab_size),
        "digest": digest(model),
    }
    problems: list[str] = []
    return found | _as_target(model, problems) | _tokenizer(path, model, problems, trust_remote_code) | {"problems": problems}


def _as_target(model: "PreTrainedModel", problems: list[str]) -> dict[str, Any]:
    """What only a target knows; the reason alone, which is among the problems too, if the model is refused."""
    from headstart.target.selfcheck import MAX_CHECK
    from headstart.target.target import Target

    try:
        target = Target(model)
        target.choose_kernels()
    except ValueError as error:
        problems.append(str(error))
        return {"refusal": str(error)}
    longest = max((window.sliding or window.chunk or 0 for window in target.windows), default=0)
    if longest > MAX_CHECK:
        problems.append(f"the self-check reads {MAX_CHECK} tokens at most and did not go beyond the window of {longest}")
    claimed = int(getattr(model.config.get_text_config(), "max_position_embeddings", target.context))
    if target.context < claimed:
        problems.append(f"the context is {target.context} of {claimed}: beyond it, positions would change with other rows")
    return {
        "context": target.context,
        "window": [_window(window) for window in target.windows],
        "cache_bytes_per_token": target.slot_bytes,
        "exact": _exactness(target),
    }


def _exactness(target: "Target") -> str:
    """Whether speculation equals plain decoding to the bit here, by default."""
    found = target.kernel_choice
    assert found is not None, "choose_kernels the target first"
    return "to the bit" if found.is_exact else f"up to near ties: {found.why_not}"


def _window(window: "Window") -> str:
    if window.sliding is not None:
        return f"window of {window.sliding}"
    return "everything" if window.chunk is None else f"chunk of {window.chunk}"


def _tokenizer(path: str, model: "PreTrainedModel", problems: list[str], trust_remote_code: bool) -> dict[str, Any]:
    from headstart.target.tokenizer_loading import load_tokenizer
    from headstart.text.tokenizer import stop_token_ids

    try:
        tokenizer = load_tokenizer(path, trust_remote_code)
    except ValueError as error:
        problems.append(str(error))
        return {"tokenizer": None}
    stops = stop_token_ids(tokenizer, model.generation_config, model.config)
    if len(tokenizer) > int(model.config.get_text_config().vocab_size):
        problems.append(f"the tokenizer knows {len(tokenizer)} tokens, more than the model's vocabulary")
    return {
        "tokenizer": type(tokenizer).__name__,
        "chat_template": tokenizer.chat_template is not None,
        "stop_tokens": {str(tokenizer.convert_ids_to_tokens(token)): token for token in stops},
    }


# -- printing ---------------------------------------------------------------------------------------------------------------


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in found.items():
        if name == "notes":
            for note in value:
                table.add_row("note", note)
        elif name != "problems":
            table.add_row(name.replace("_", " "), _readable(name, value))
    for problem in found["problems"] or ["none"]:
        table.add_row("problem" if found["problems"] else "problems", problem)
    Console(highlight=False, markup=False).print(table)


def _readable(name: str, value: object) -> str:
    if name == "bytes":
        return f"{int(str(value)) / 2**20:,.1f} MiB"
    if name == "window" and isinstance(value, Sequence):
        return ", ".join(f"{len([*run])} layers see {what}" for what, run in groupby(value))
    if name == "probe" and isinstance(value, dict):
        shares = " ".join(f"{share:.2f}" for share in value["acceptance"])
        return f"tau {value['tau']:.2f} at temperature {value['temperature']:g}, accepted by depth {shares}"
    if isinstance(value, dict):
        return ", ".join(f"{token} ({number})" for token, number in value.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return "missing" if value is None else str(value)
