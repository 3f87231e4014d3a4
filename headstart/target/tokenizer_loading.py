"""The tokenizer in a folder or on the hub, or one sentence that says what is wrong with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, cast

from headstart.target.adapters import adapted_by
from headstart.text.jsonl import read_object, why

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FACTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or of a model id on the hub. An adapter without one has that of its model.

    trust_remote_code: whether Python files in that folder may run. Raises ValueError, in one sentence, for what cannot be loaded.
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
    """Raise ValueError, naming the file, for one that is damaged; transformers would fail on it in ways that name none."""
    for name in TOKENIZER_FACTS:
        if (folder / name).is_file():
            said = read_object(folder / name)
            if not isinstance(said.get("model_max_length"), int | float | None):
                raise ValueError(f"{folder / name}: model_max_length is {said['model_max_length']!r}; it must be a number")
