"""The native format: heads in a folder with `config.json`, `model.safetensors` and `README.md`. Must not import a method.

A kill at any moment leaves complete heads, old or new. Everything is written to a hidden subfolder first; the heads change
when the new `model.safetensors` replaces the old one. It holds a copy of the configuration, which `load` uses where `config.json`
differs.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headstart.drafters.registry import method
from headstart.formats.description import CONFIG, Description, first_error, is_native, parse
from headstart.formats.disk import sync
from headstart.formats.draft_vocab import native_id_error
from headstart.formats.model_card import card, with_section
from headstart.formats.target_info import TargetInfo, check
from headstart.speculation.heads_plan import PLAN
from headstart.text.jsonl import read_object

if TYPE_CHECKING:
    from headstart.drafters.parts.heads import Heads

WEIGHTS, CARD = "model.safetensors", "README.md"
STAGING = ".saving-"


def save(folder: str | Path, drafter: Heads, target_info: TargetInfo, training: Mapping[str, Any]) -> None:
    """Save heads in a folder; on failure, the heads that were there stay as they are. Their `plan.json` is removed with them.

    drafter: a clone that is not packed for drafting.
    target_info: of the target that the heads draft for.
    training: what to record of their training.
    Raises ValueError where the folder cannot be written, as on a full disk, and where it holds something else, as a model.
    """
    folder = Path(folder)
    _require_native_or_empty(folder)
    described = Description(
        method=type(drafter).name,
        settings=drafter.config.model_dump(mode="json"),
        target=target_info,
        training=dict(training),
    )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in drafter.state_dict().items()}
    with torch.device("meta"):
        expected = _build(described, folder).state_dict()
    assert tensors.keys() == expected.keys(), "these heads are packed for drafting; save their clone"
    assert not any(native_id_error(ids, target_info.vocab) for ids in tensors.values() if not ids.is_floating_point()), (
        "the draft vocabulary is not valid"
    )
    with _write_errors(folder, "heads that were there are untouched"), _staging(folder) as staged:
        _write(staged, described, tensors)
        os.replace(staged / WEIGHTS, folder / WEIGHTS)  # a kill before this line leaves the old heads, after it the new ones
        with _write_errors(folder, f"the new heads are complete, but {CARD} and {PLAN} may still be of the old ones"):
            os.replace(staged / CONFIG, folder / CONFIG)
            (folder / PLAN).unlink(missing_ok=True)
            os.replace(staged / CARD, folder / CARD)


def load(folder: str | Path, target_info: TargetInfo | None = None) -> Heads:
    """The drafter saved in `folder`, in evaluation mode, in the dtype it was saved in; not yet bound to a target.

    target_info: of the target to draft for; None: not compared with the one that the heads record.
    Raises ValueError, in one sentence, for a folder without native heads, an unknown key or method, another version of the format,
    a tensor that is missing, extra or of the wrong shape, and heads for another hidden size, vocabulary or tokenizer.
    Warns where the target's digest is another one, as of a fine-tune.
    """
    folder = Path(folder)
    described = describe(folder)
    if target_info is not None:
        check(described.target, target_info, folder)
    with torch.random.fork_rng(devices=[]):  # the initial weights are discarded; callers' random numbers must not change
        drafter = _build(described, folder)
    tensors = _tensors(folder)
    _check_tensors(drafter.state_dict(), tensors, folder)
    _check_ids(tensors, described.target.vocab, folder)
    drafter.load_state_dict(tensors, assign=True)
    return drafter.eval()


def write_card_section(folder: str | Path, title: str, body: str) -> None:
    """Add a section to the model card of native heads, in place of one of the same title; a missing card is written anew.

    title: of the section.
    body: its text, without the title.
    Raises ValueError where the folder holds no native heads, or cannot be written.
    """
    folder = Path(folder)
    described = describe(folder)
    with _write_errors(folder, f"{CARD} is unchanged"), _staging(folder) as staged:
        try:
            text = (folder / CARD).read_text(encoding="utf-8")
        except FileNotFoundError:
            with _opened(folder) as file:
                sizes = [torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys()]  # noqa: SIM118
            text = card(described, sum(sizes))
        (staged / CARD).write_text(with_section(text, title, body), encoding="utf-8")
        os.replace(staged / CARD, folder / CARD)


def describe(folder: str | Path) -> Description:
    """The description of the native heads in `folder`, without reading their tensors.

    Raises ValueError where there are none.
    Warns where `config.json` differs from the copy saved with the weights, and returns the copy.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds no heads: it has no {CONFIG}; heads are a folder made by `headstart train` or `import`")
    described = parse((folder / CONFIG).read_bytes(), folder)
    with _opened(folder) as file:
        copy = (file.metadata() or {}).get("headstart")
    if copy is None or (saved := parse(copy, folder)) == described:
        return described
    warnings.warn(
        f"{folder / CONFIG} is not what was saved with the weights: saving was interrupted, or it was edited; the one saved inside "
        f"{WEIGHTS} counts",
        stacklevel=2,
    )
    return saved


# -- reading ----------------------------------------------------------------------------------------------------------------


def _build(described: Description, folder: Path) -> Heads:
    """The drafter of this description, with untrained weights."""
    try:
        kind = method(described.method)
        settings = kind.config_type.model_validate(described.settings)
    except ValidationError as error:
        raise ValueError(first_error(error, folder / CONFIG)) from None
    except ValueError as error:
        raise ValueError(f"{folder} holds heads that this headstart does not know: {error}") from None
    return kind(settings, described.target.hidden, described.target.vocab)


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise ValueError(f"the heads in {folder} have no {WEIGHTS}; copy the folder again") from None
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or cut short: {error}; copy it again") from None


def _tensors(folder: Path) -> dict[str, Tensor]:
    with _opened(folder) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a safetensors file is no mapping)


def _check_tensors(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], folder: Path) -> None:
    where = folder / WEIGHTS
    for name, tensor in expected.items():
        if name not in actual:
            raise ValueError(f"{where} lacks {name} {list(tensor.shape)}")
        if actual[name].shape != tensor.shape:
            raise ValueError(f"{where} has {name} as {list(actual[name].shape)}, but these heads need {list(tensor.shape)}")
        if tensor.is_floating_point() != actual[name].is_floating_point():
            needed = "floating-point numbers" if tensor.is_floating_point() else str(tensor.dtype)
            raise ValueError(f"{where} has {name} of type {actual[name].dtype}, but these heads need {needed}")
    if broken := next((name for name, tensor in actual.items() if not bool(torch.isfinite(tensor).all())), None):
        raise ValueError(f"{where} has values in {broken} that are not finite (nan or inf); train or import the heads again")
    if extra := sorted(actual.keys() - expected.keys()):
        raise ValueError(f"{where} has {len(extra)} tensors that these heads have no place for, first {extra[0]}")


def _check_ids(tensors: Mapping[str, Tensor], vocab: int, folder: Path) -> None:
    """Check the integer tensors of heads, which hold the ids of their draft vocabulary."""
    for name, ids in tensors.items():
        if not ids.is_floating_point() and (error := native_id_error(ids, vocab)):
            raise ValueError(f"{folder / WEIGHTS} has {name} that cannot be right: {error}; copy or import the heads again")


# -- writing ----------------------------------------------------------------------------------------------------------------


def _require_native_or_empty(folder: Path) -> None:
    """Raise ValueError for a folder whose `config.json` is not of native heads: a model's files have the same names."""
    try:
        is_other = (folder / CONFIG).exists() and not is_native(read_object(folder / CONFIG))
    except (ValueError, OSError):
        is_other = True
    if is_other:
        raise ValueError(f"{folder} holds something else than heads of this format; name another folder for the heads")


def _write(staged: Path, described: Description, tensors: Mapping[str, Tensor]) -> None:
    text = described.model_dump_json(indent=2) + "\n"
    save_file(dict(tensors), staged / WEIGHTS, metadata={"format": "pt", "headstart": text})
    (staged / CONFIG).write_text(text, encoding="utf-8")
    shutil.copymode(staged / CONFIG, staged / WEIGHTS)  # safetensors writes files that only their owner can read
    (staged / CARD).write_text(card(described, sum(map(Tensor.numel, tensors.values()))), encoding="utf-8")
    for path in staged.iterdir():
        sync(path)


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A hidden folder on the same disk, removed at the end. One that a killed run left behind is removed first."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{STAGING}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=STAGING, dir=folder, ignore_cleanup_errors=True) as staged:
        yield Path(staged)


@contextmanager
def _write_errors(folder: Path, remains: str) -> Iterator[None]:
    """Turn errors of writing into one ValueError. remains: what is in the folder after the error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"heads cannot be written to {folder}: {error}; {remains}; free space or name another folder") from error
