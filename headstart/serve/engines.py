"""Another engine as the server: heads in its format, and the command that starts it with them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from headstart.engine.drafter_loading import folder_of
from headstart.formats import native
from headstart.formats.exporting import export_heads
from headstart.formats.exports import EXPORTERS
from headstart.formats.exports.launch import launch_command
from headstart.formats.exports.record import read_record
from headstart.target.loading import embedded
from headstart.text.jsonl import read_object


@dataclass(frozen=True)
class Engine:
    """An engine that this package can start.

    formats: of exports that it reads; native heads are exported to the first that takes their method.
    module: of Python that is there where it is installed.
    options: that are added to its command.
    install: the command that installs it.
    """

    formats: tuple[str, ...]
    module: str
    options: tuple[str, ...]
    install: str


ENGINES = {
    "vllm": Engine(("vllm", "speculators", "hf"), "vllm", (), "pip install vllm"),
    "sglang": Engine(("sglang",), "sglang", ("--enable-metrics",), "pip install 'sglang[all]'"),  # without it /metrics is off
}


@dataclass(frozen=True)
class Launch:
    """How an engine is started.

    engine: its name.
    command: program and arguments.
    heads: folder of the exported heads.
    is_new: whether they were exported just now.
    notes: what the user should know, in sentences.
    """

    engine: str
    command: list[str]
    heads: str
    is_new: bool
    notes: list[str]


def prepare(
    engine: str,
    model: str | None,
    heads: str,
    out: Path | None = None,
    more: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> Launch:
    """How to start an engine with heads, which are exported first if they are native.

    engine: one of `ENGINES`.
    model: folder or hub id of the target; None: the embedded one.
    heads: folder or hub id, of native heads or of an export; for the embedded model also the name of a method.
    out: folder for the export of native heads.
    more: further arguments of the engine.
    trust_remote_code: let Python files in the model's folder run, here and in the engine.
    Raises ValueError for an export of another engine or for another model, and as `export_heads` does.
    """
    if engine not in ENGINES:
        raise ValueError(f"--engine is {engine!r}; it must be one of {', '.join(ENGINES)}")
    source, folder = model or str(embedded("target")), folder_of(heads, model)
    if folder is None:
        raise ValueError(
            f"{heads} is no folder of heads; name a folder of native heads or of an export, a hub id, or without --model a method "
            "of the embedded model"
        )
    record = read_record(folder)
    is_new = record is None
    if record is None:
        folder, record = _exported(engine, model, folder, out, trust_remote_code)
    elif out is not None:
        raise ValueError(f"{heads} is an export already, and is used as it is; leave out --out {out}")
    _check_engine(engine, folder, record)
    _check_model(source, folder, record)
    options = [*ENGINES[engine].options, *(["--trust-remote-code"] if trust_remote_code else []), *more]
    command = [*launch_command(record["engine"], record, source, str(folder)), *options]
    return Launch(engine, command, str(folder), is_new, _notes(source, record))


def _exported(engine: str, model: str | None, heads: Path, out: Path | None, trust: bool) -> tuple[Path, dict[str, Any]]:
    if out is None:
        raise ValueError(f"{heads} is no export, and {engine} cannot read native heads; --out FOLDER exports them to there first")
    formats, method = ENGINES[engine].formats, native.describe(heads).method
    format = next((one for one in formats if method in EXPORTERS[one].methods), formats[0])
    export_heads(heads, model, format, out, trust_remote_code=trust)
    record = read_record(out)
    assert record is not None, "an export has a record"
    return out, record


def _check_engine(engine: str, heads: Path, record: Mapping[str, Any]) -> None:
    formats = ENGINES[engine].formats
    if record["engine"] not in formats:
        raise ValueError(
            f"{heads} was exported for {record['engine']}, which {engine} cannot read; export the heads again with "
            f"`headstart export HEADS --to {formats[0]}`"
        )


def _check_model(model: str, heads: Path, record: Mapping[str, Any]) -> None:
    """Raise ValueError where the sizes of the heads are not those of the model; a model that is not on this disk is believed."""
    actual, expected = _sizes(_config_file(model)), _sizes(heads / "config.json")
    for name in sorted(actual.keys() & expected.keys()):
        if actual[name] != expected[name]:
            raise ValueError(
                f"{heads} was exported for {record['target']} with {name} {expected[name]}, but {model} has {actual[name]}; "
                f"name {record['target']} with --model, or export heads of that model"
            )


def _config_file(model: str) -> Path:
    """The `config.json` of a folder, or of a hub id as far as it was downloaded."""
    from huggingface_hub import try_to_load_from_cache

    if (folder := Path(model)).is_dir():
        return folder / "config.json"
    try:
        cached = try_to_load_from_cache(model, "config.json")
    except ValueError as error:  # neither a folder nor the form of a hub id
        raise ValueError(f"model {model!r} is neither a folder nor the id of a model on the hub") from error
    return Path(cached) if isinstance(cached, str) else folder / "config.json"


def _sizes(path: Path) -> dict[str, int]:
    """The sizes that a configuration gives, of its language model; empty where there is none."""
    try:
        config = read_object(path)
    except (OSError, ValueError):
        return {}
    inner = config.get("text_config") or config.get("transformer_layer_config") or config
    hidden = config.get("target_hidden_size") or inner.get("hidden_size")  # heads may be narrower than their target
    sizes = {"hidden_size": hidden, "vocab_size": inner.get("vocab_size")}
    return {name: size for name, size in sizes.items() if isinstance(size, int)}


def _notes(model: str, record: Mapping[str, Any]) -> list[str]:
    notes = [f"chains of {record['chain']} drafts: {record['chain_source']}"]
    name = Path(model).resolve().name if Path(model).is_dir() else model
    if Path(model) != embedded("target") and record["target"] != name:
        notes.append(f"the heads were exported for {record['target']}; if {model} has other weights, fewer drafts are kept")
    return [*notes, *record.get("notes", ())]


def start(launch: Launch) -> NoReturn:
    """Replace this process by the engine. Raises ValueError where it is not installed."""
    command, engine = list(launch.command), ENGINES[launch.engine]
    if command[0] == "python":  # a module of the Python that runs this package
        program = sys.executable if find_spec(engine.module) is not None else None
    else:
        program = shutil.which(command[0]) or shutil.which(command[0], path=str(Path(sys.executable).parent))
    if program is None:
        raise ValueError(
            f"{launch.engine} is not installed here; install it with: {engine.install}, or run the command that is printed without "
            "--start where it is"
        )
    sys.stdout.flush()
    os.execv(program, [program, *command[1:]])
