"""Exports of ours, brought back: what `conformance.json` adds to what their files say. Must not import an exporter.

The files decide; the record fills in what their format has no place for: settings of drafting and training, and which layers the
numbers of EAGLE-3 heads mean. Tensors that an export made anew, as copies of the target's LM head, are left out again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from headstart.formats.description import first_error
from headstart.formats.exports.base import sha256
from headstart.formats.exports.record import CONFORMANCE
from headstart.formats.published.base import Published
from headstart.formats.published.eagle3_head import Eagle3Head
from headstart.formats.published.taps import Convention
from headstart.formats.weights import Weights

CONVENTIONS: dict[str, Convention] = {"vllm": "inputs", "speculators": "inputs", "sglang": "outputs"}  # of the layers' numbers


def without_made_anew(weights: Weights, record: Mapping[str, Any]) -> Weights:
    """The weights without the tensors that the export made anew, if they are still what it wrote."""
    entries = [entry for entry in record.get("tensors", ()) if isinstance(entry, dict) and entry.get("ours", "") is None]
    anew = {entry["theirs"] for entry in entries if entry.get("theirs") in weights.shapes and _is_unchanged(weights, entry)}
    return weights.without(anew) if anew else weights


def _is_unchanged(weights: Weights, entry: Mapping[str, Any]) -> bool:
    return sha256(weights[entry["theirs"]]) == entry.get("sha256")


def restored(published: Published, record: Mapping[str, Any]) -> Published:
    """The heads of an export with the settings that its format has no place for."""
    settings = record.get("settings")
    if published.refused or record.get("method") != published.method or not isinstance(settings, dict):
        return published
    own = {name: value for name, value in published.settings.items() if value is not None and name not in _OF_DRAFTING}
    lacking = {name: value for name, value in settings.items() if name not in own and name not in _OF_TENSORS}
    merged = {**published.settings, **lacking, **_block(published.settings, settings)}
    try:
        published.kind.config_type.model_validate(merged)
    except ValidationError as error:
        raise ValueError(first_error(error, published.weights.files[0].parent / CONFORMANCE)) from None
    heads = replace(published, settings=merged)
    convention = CONVENTIONS.get(str(record.get("engine")))
    return replace(heads, convention=convention) if isinstance(heads, Eagle3Head) and convention else heads


_OF_DRAFTING = ("depth",)  # settings that no file holds; what a reader takes instead is a default
_OF_TENSORS = ("draft_vocab",)  # settings that only the tensors decide, where they say nothing too


def _block(ours: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded block, as it was written, where it describes the same layers as the file's."""
    stored, written = ours.get("block"), recorded.get("block")
    is_same = isinstance(stored, dict) and isinstance(written, dict) and _layers(stored) == _layers(written)
    return {"block": written} if is_same else {}


def _layers(block: Mapping[str, Any]) -> Any:
    """All that transformers makes of a block's settings; the settings themselves where it makes nothing of them."""
    from transformers import AutoConfig

    named = {name: value for name, value in block.items() if name != "model_type"}
    try:
        return AutoConfig.for_model(str(block.get("model_type")), **named).to_dict()
    except (ValueError, TypeError, KeyError, AttributeError):
        return dict(block)
