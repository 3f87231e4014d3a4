"""Importing published heads: read, fitted to their target, saved as native heads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from headstart.formats import hub
from headstart.formats.detect import published_in
from headstart.formats.native import save
from headstart.formats.published.base import Published
from headstart.formats.target_info import describe_target
from headstart.formats.weights import GGUF
from headstart.target.embed_head import EmbedHead
from headstart.target.loading import load_model
from headstart.target.tokenizer_loading import load_tokenizer

# Settings that the summary of an import lists: its keys, and the fields of a method's `config_type`.
_SUMMARY = {"heads": "num_heads", "layers": "num_layers", "modules": "num_modules", "taps": "taps", "draft_vocab": "draft_vocab"}


def import_heads(
    source: str, target: str | None, out: str, taps: Sequence[int] = (), trust_remote_code: bool = False
) -> dict[str, Any]:
    """Convert published heads, save them in `out`, and return a summary for printing or JSON.

    source: folder, file or hub id of the heads, or of a model with heads inside.
    target: folder or hub id of the model they draft for; None: the source, if a model is in it.
    taps: layers of the target that the heads read, where a person names them; see `Published.for_target`.
    Raises ValueError where there are no heads to import, their target is unknown, or they do not fit it.
    """
    is_on_hub = hub.is_id(source)
    published = published_in(hub.fetched_of_others(source) if is_on_hub else source)
    target = _target_of(published, source) if target is None else target
    model = load_model(target, "auto", "cpu", trust_remote_code)
    target_info = describe_target(model, load_tokenizer(target, trust_remote_code))
    published = published.for_target(target_info, partial(EmbedHead, model), taps)
    heads = published.read(target_info, model.config)
    training = {
        "imported_from": source if is_on_hub else Path(source).name,
        "format": published.layout,
        "made_for": published.base or "not said",
    }
    save(out, heads, target_info, training)
    return {
        "found": published.layout,
        "method": published.method,
        **{key: published.settings[name] for key, name in _SUMMARY.items() if published.settings.get(name) is not None},
        "hidden": published.hidden,
        "vocab": published.vocab or target_info.vocab,
        "parameters": published.parameters,
        "target": target,
        "out": out,
        "notes": [*published.notes, *_doubts(published, source, target)],
        "use": f"headstart generate --model {target} --drafter {out}",
    }


def _target_of(published: Published, source: str) -> str:
    """The target, where nobody names it: the model in the same files."""
    if published.has_trunk and published.weights.files[0].suffix != GGUF:
        return source
    example = f", such as --target {published.base}" if published.base else ""
    raise ValueError(f"the heads in {source} draft for a model that is not with them; name it with --target{example}")


def _doubts(published: Published, source: str, target: str) -> list[str]:
    """Reasons why few drafts may be accepted; the text is right in any case."""
    if published.has_trunk:
        is_same = Path(source).resolve() == Path(target).resolve()
        trained = f"these heads were trained together with the model in {source}, which is their target"
        return [trained if is_same else f"{trained}; with {target} fewer of their drafts may be accepted"]
    if published.base and Path(published.base).name != Path(target).name:
        return [f"they name {published.base} as their model; whether {target} is the same, `headstart inspect --probe` measures"]
    return []
