"""What heads must know of their target, and whether a target is the one they were trained for.

This file knows shapes and fingerprints. It refuses to know files and methods.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from headstart.target.loading import digest, embedded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEX = 16  # digits of a fingerprint
EMBEDDED = "headstart-embedded"  # what the embedded model is called: no command needs to name it


class TargetInfo(BaseModel):
    """A target, as its heads remember it.

    hidden, vocab: widths of its final states and of its logits. digest: fingerprint of its weights, None where heads from
    elsewhere do not say. tokenizer: fingerprint of its vocabulary, None where it was not at hand.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    architecture: str
    hidden: int
    vocab: int
    layers: int
    digest: str | None = None
    tokenizer: str | None = None


def describe_target(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> TargetInfo:
    """What heads remember of this model; the same before and after a `Target` has packed its linears."""
    config = model.config.get_text_config()
    return TargetInfo(
        name=_name(str(model.config._name_or_path or type(model).__name__)),
        architecture=type(model).__name__,
        hidden=int(config.hidden_size),
        vocab=_vocab(model),
        layers=int(config.num_hidden_layers),
        digest=digest(model),
        tokenizer=None if tokenizer is None else tokenizer_digest(tokenizer),
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits of the vocabulary: which token has which id."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:HEX]


def check(heads: TargetInfo, target: TargetInfo, folder: Path) -> None:
    """Raise ValueError where heads made for `heads` cannot work on `target`; warn where they were made for other weights."""
    for what, mine, yours in (
        ("a hidden size", heads.hidden, target.hidden),
        ("a vocabulary", heads.vocab, target.vocab),
        ("a tokenizer", heads.tokenizer, target.tokenizer),
    ):
        if mine is not None and yours is not None and mine != yours:
            raise ValueError(
                f"the heads in {folder} were made for {heads.name} with {what} of {mine}, but {target.name} has {yours}; "
                f"use them with {heads.name}, or train new ones with `headstart train`"
            )
    if None not in (heads.digest, target.digest) and heads.digest != target.digest:
        warnings.warn(
            f"the heads in {folder} were trained for other weights ({heads.name}, digest {heads.digest}) than those of "
            f"{target.name} (digest {target.digest}): the text stays the same, but fewer drafts may be accepted; measure it with "
            f"`headstart inspect {folder} --model TARGET --probe`",
            stacklevel=3,
        )


def model_option(name: str) -> str:
    """How a command names a target: not at all, if it is the embedded model."""
    return "" if name == EMBEDDED else f"--model {name} "


def _name(given: str) -> str:
    """A hub id as it is, of a folder only its own name: where it lies on one machine says nothing on another."""
    path = Path(given)
    if path == embedded("target"):
        return EMBEDDED
    is_local = path.is_absolute() or path.exists() or given.count("/") != 1 or given.startswith(".")
    return path.resolve().name if is_local else given


def _vocab(model: PreTrainedModel) -> int:
    """Width of the logits, which may be padded beyond what the configuration says."""
    head = model.get_output_embeddings()
    return int(getattr(head, "out_features", None) or model.config.get_text_config().vocab_size)
