"""What heads record of their target, and the check that a target is the one they were trained for.

Holds sizes and hashes; must not import methods or other formats.
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

HEX = 16  # hexadecimal digits of a hash
EMBEDDED = "headstart-embedded"  # name of the embedded model, which no command needs to name


class TargetInfo(BaseModel):
    """A target, as its heads record it.

    name: hub id, or name of its folder.
    architecture: its class in transformers.
    hidden: width of its last hidden states.
    vocab: width of its logits.
    layers: number of its decoder layers.
    digest: hash of its weights, which distinguishes a fine-tune from its base model; None: imported heads that do not record it.
    tokenizer: hash of its tokenizer's vocabulary; None: the tokenizer was not available.
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
    """What heads record of this model; the same before and after a `Target` has packed its linears.

    tokenizer: the model's; None: its hash is not recorded.
    """
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
    """Hash of a tokenizer's vocabulary, that is, of which token has which id: 16 hexadecimal digits."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:HEX]


def check(heads: TargetInfo, target: TargetInfo, folder: Path) -> None:
    """Raise ValueError where heads cannot work on a target; warn where they were made for other weights.

    heads: the target that the heads record.
    target: the target they are to be used with.
    folder: of the heads, for the messages.
    """
    for what, expected, actual in (
        ("a hidden size", heads.hidden, target.hidden),
        ("a vocabulary", heads.vocab, target.vocab),
        ("a tokenizer", heads.tokenizer, target.tokenizer),
    ):
        if expected is not None and actual is not None and expected != actual:
            raise ValueError(
                f"the heads in {folder} were made for {heads.name} with {what} of {expected}, but {target.name} has {actual}; "
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
    """The option of a command that names a target, with a space behind it; empty for the embedded model."""
    return "" if name == EMBEDDED else f"--model {name} "


def _name(name_or_path: str) -> str:
    """A hub id unchanged; of a folder only its last name, since its path means nothing on another machine."""
    path = Path(name_or_path)
    if path == embedded("target"):
        return EMBEDDED
    is_local = path.is_absolute() or path.exists() or name_or_path.count("/") != 1 or name_or_path.startswith(".")
    return path.resolve().name if is_local else name_or_path


def _vocab(model: PreTrainedModel) -> int:
    """Width of the logits, which may be padded beyond the configuration's `vocab_size`."""
    head = model.get_output_embeddings()
    return int(getattr(head, "out_features", None) or model.config.get_text_config().vocab_size)
