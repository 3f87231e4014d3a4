"""Loading a tokenizer from a folder or the hub; every fault is a ValueError of one sentence. This module must not load models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, cast

from headstart.target.adapters import adapted_by
from headstart.text.jsonl import read_object, why

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")  # one is enough
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or on the hub; for an adapter without one, that of its base model.

    path: a folder or a hub id.
    trust_remote_code: whether Python files in that folder may run.
    Raises ValueError, in one sentence, for a tokenizer that is missing or damaged.
    """
    folder = Path(path)
    if not folder.exists() and not HUB_ID.fullmatch(str(path)):
        raise ValueError(f"there is no folder {str(path)!r} to load a tokenizer from")
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if (base := adapted_by(folder)) is not None:
            return load_tokenizer(base, trust_remote_code)
        raise ValueError(f"no tokenizer in the folder {str(path)!r}: looked for {', '.join(TOKENIZER_FILES)}")
    from transformers import AutoTokenizer

    if folder.is_dir():
        _check_files(folder)
    try:
        return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code))
    except Exception as error:  # of transformers, tokenizers and sentencepiece, which share no base class
        raise ValueError(f"cannot load a tokenizer from {str(path)!r}: {why(error)}") from error


def _check_files(folder: Path) -> None:
    """Raise ValueError, naming the file, for a damaged JSON file; the errors of transformers name no file."""
    for name in JSON_FILES:
        if (folder / name).is_file():
            content = read_object(folder / name)
            if not isinstance(content.get("model_max_length"), int | float | None):
                raise ValueError(f"{folder / name}: model_max_length is {content['model_max_length']!r}; it must be a number")
