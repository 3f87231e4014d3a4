"""Small tokenizers of three kinds, and real ones where their models are present."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headstart.target.tokenizer_loading import load_tokenizer

MODELS = Path(__file__).parents[2] / "shared" / "models"


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<s>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>")])  # added, but not special: it is part of the text
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def byte_level() -> PreTrainedTokenizerFast:
    """A vocabulary of every byte and a few merges: a space with a letter, half a character, a letter and a first byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    euro = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("€")[0][0]
    merges = [("Ġ", "a"), (euro[0], euro[1]), ("b", euro[0])]
    vocab = {token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrap(tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Like Llama 2's: words include the space before them, unknown characters become byte tokens."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abc.\n€", "▁a", "ab"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    tokenizer = byte_fallback().backend_tokenizer
    tokenizer.decoder = decoders.Metaspace()
    return wrap(tokenizer)


TOKENIZERS = {"byte_level": byte_level(), "byte_fallback": byte_fallback(), "metaspace": metaspace()}
FOLDERS = sorted(folder.parent for folder in MODELS.glob("*/tokenizer.json"))
REAL = {folder.name: load_tokenizer(folder) for folder in FOLDERS}
