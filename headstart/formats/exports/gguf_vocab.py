"""A target's tokenizer as llama.cpp's GGUF files have it. llama.cpp splits text by rules of its own, known by name: only tokenizers
whose rules are among them can be written, and they are recognised by what their `tokenizer.json` says, not by a hash of its output.

Read in `src/llama-vocab.cpp` of the llama-cpp-python 0.3.36 source package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.formats.gguf_file import import_gguf
from headstart.text.jsonl import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DEEPSEEK = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
_BYTES = ("ByteLevel", False)  # no splitting of its own
# llama.cpp's name of the rules, by the steps of a tokenizer.json: their types, and what each splits at.
_RULES: Mapping[tuple[tuple[str, Any], ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _WORDS + r"\p{N}" + _REST), _BYTES): "qwen2",
    (("Split", _WORDS + r"\p{N}{1,3}" + _REST), _BYTES): "smaug-bpe",
    (
        ("Split", r"\p{N}{1,3}"),
        ("Split", "[一-龥\u3040-ゟ゠-ヿ]+"),
        ("Split", _DEEPSEEK + r"|\s*[\r\n]+|\s+(?!\S)|\s+"),
        _BYTES,
    ): "deepseek-v3",
}
_WHOLE_WORDS = {"smaug-bpe": "llama-bpe"}  # the name of the same rules where a word that is a token is never split (ignore_merges)
_WAY_OUT = (
    "convert the model, and the heads of an export --to vllm, with llama.cpp's own convert_hf_to_gguf.py --target-model-dir, which "
    "must know the tokenizer too"
)


@dataclass(frozen=True)
class ByteLevelVocabulary:
    """A tokenizer of byte pairs.

    folder: with its `tokenizer.json`.
    tokenizer: the same, loaded.
    rules: llama.cpp's name of the rules by which it splits text.
    size: rows of the embedding, which may be more than the tokenizer has tokens.
    stop_ids: ids of the tokens that end an answer.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    rules: str
    size: int
    stop_ids: tuple[int, ...]

    def add_to(self, writer: Any) -> None:
        """Add the tokens, merges and special tokens. writer: a `GGUFWriter`."""
        special = import_gguf().SpecialVocab(self.folder, load_merges=True)
        special.add_special_token = dict(zip(("bos", "eos"), self._added(), strict=True))
        special.special_token_ids.update(self._ids())
        texts, kinds = zip(*self._tokens(), strict=True)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.rules)
        writer.add_token_list(texts)
        writer.add_token_types(kinds)
        special.add_to_gguf(writer, quiet=True)

    def _tokens(self) -> Iterator[tuple[str, int]]:
        """(text, type) of every id."""
        kinds = import_gguf().TokenType
        texts: dict[int, str] = {index: text for text, index in self.tokenizer.get_vocab().items()}
        added = self.tokenizer.added_tokens_decoder
        for index in range(self.size):
            if index not in texts:
                yield f"[PAD{index}]", int(kinds.UNUSED)
            elif index in added:
                yield texts[index], int(kinds.CONTROL if added[index].special else kinds.USER_DEFINED)
            else:
                yield texts[index], int(kinds.NORMAL)

    def _added(self) -> tuple[bool, bool]:
        """Whether the tokenizer puts its first token before a text, and its last one behind it."""
        ids = self.tokenizer("a")["input_ids"]
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return first is not None and ids[0] == first, last is not None and ids[-1] == last

    def _ids(self) -> dict[str, int]:
        ids = {"bos": self.tokenizer.bos_token_id, "eos": self.tokenizer.eos_token_id}
        others = [end for end in self.stop_ids if end != ids["eos"]]
        if ids["eos"] is not None and others:
            ids["eot"] = others[0]
        return {kind: int(index) for kind, index in ids.items() if index is not None}


def vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, config: Any) -> ByteLevelVocabulary:
    """The tokenizer of a target. config: of the target's language model.

    Raises ValueError where llama.cpp would split texts into other tokens.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no tokenizer.json, without which no tokens can be written to a GGUF file; {_WAY_OUT}")
    if fault := _fault(content := read_object(path)):
        raise ValueError(f"the tokenizer in {folder} cannot be written to a GGUF file: {fault}; {_WAY_OUT}")
    end = config.eos_token_id
    stop_ids = tuple(end) if isinstance(end, list | tuple) else () if end is None else (end,)
    return ByteLevelVocabulary(folder, tokenizer, rules_of(content) or "", int(config.vocab_size), stop_ids)


def rules_of(content: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of the rules by which a tokenizer splits text; None where it has no such rules.

    content: of its `tokenizer.json`.
    """
    name = _RULES.get(tuple(_steps(content.get("pre_tokenizer") or {})))
    return _WHOLE_WORDS.get(name, name) if name and content["model"].get("ignore_merges") else name


def _fault(content: Mapping[str, Any]) -> str | None:
    """Why llama.cpp would make other tokens, or None."""
    model, normalizer = content.get("model") or {}, (content.get("normalizer") or {}).get("type")
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return f"its model is of type {model.get('type')!r}, and only byte-level BPE can be written"
    if normalizer not in (None, "NFC"):
        return f"it changes texts with {normalizer!r} first, which llama.cpp does not"
    rules = rules_of(content)
    if rules is None:
        return f"it splits texts by rules that llama.cpp does not have ({' and '.join(_kinds(content)) or 'none'})"
    if bool(model.get("ignore_merges")) is not (rules in _WHOLE_WORDS.values()):
        return f"its ignore_merges is {model.get('ignore_merges')}, and llama.cpp's rules {rules!r} are for the other value"
    return None


def _kinds(content: Mapping[str, Any]) -> list[str]:
    return [str(kind) for kind, _ in _steps(content.get("pre_tokenizer") or {})]


def _steps(step: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(type, what it splits at) of the steps by which a tokenizer splits text; of settings that are not known, with None."""
    kind = str(step.get("type"))
    inner: Sequence[Mapping[str, Any]] = step.get("pretokenizers") or ()
    if kind == "Sequence":
        for each in inner:
            yield from _steps(each)
    elif kind == "Split":
        is_plain = step.get("behavior") == "Isolated" and not step.get("invert")
        yield kind, (step.get("pattern") or {}).get("Regex") if is_plain else None
    elif kind == "ByteLevel":
        yield kind, None if step.get("add_prefix_space") else bool(step.get("use_regex", True))
    elif kind == "Digits":
        yield kind, bool(step.get("individual_digits"))
    elif step:
        yield kind, None
