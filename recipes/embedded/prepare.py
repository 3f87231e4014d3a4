"""Prepares the data folder: a tokenizer, and two flat arrays of tokens per source, train and held out.

python -m recipes.embedded.prepare --data DATA --work WORK
"""

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recipes.embedded.sources import SOURCES, Document, Source, documents

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|end|>"
SPECIAL_TOKENS = [END_OF_TEXT, "<|user|>", "<|assistant|>", END_OF_TURN]
CONTEXT = 1024
VOCAB = 4096


def train_tokenizer(texts: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab` tokens, trained on `texts`; every digit is a token."""
    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        extra_special_tokens=SPECIAL_TOKENS[1:],
        chat_template=Path(__file__).with_name("chat_template.jinja").read_text(),
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def plain_text(document: Document) -> str:
    """The text of a document without the chat template."""
    return document.text or "\n".join(m["content"] for m in document.messages)


def sample_for_vocabulary(parts: dict[str, list[Document]], num_characters: int) -> Iterable[str]:
    """Texts of every source in proportion to its share in training.

    parts: train documents by source.
    num_characters: of all texts together.
    """
    for source in SOURCES:
        remaining = num_characters * source.share
        for document in parts[source.name]:
            if remaining <= 0:
                break
            text = plain_text(document)[: int(remaining) + 1]
            remaining -= len(text)
            yield text


def encode(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """The documents as one stream, each ended by <|endoftext|>, [tokens] uint16."""
    texts = [tokenizer.apply_chat_template(list(d.messages), tokenize=False) if d.messages else d.text for d in documents]
    end = tokenizer.eos_token_id
    return np.array([i for ids in tokenizer(texts)["input_ids"] for i in (*ids, end)], dtype=np.uint16)


def split(source: Source, data: Path, seed: int) -> tuple[list[Document], list[Document]]:
    """The shuffled documents of one source: train and held out."""
    shuffled = list(documents(source, data))
    random.Random(f"{seed}/{source.name}").shuffle(shuffled)
    return [d for d in shuffled if not d.is_held_out], [d for d in shuffled if d.is_held_out]


def prepare(data: Path, work: Path, tokenizer_folder: Path | None = None, seed: int = 0) -> dict[str, dict]:
    """Write tokenizer/, tokens/ and sources.json under `work`; returns the content of sources.json.

    tokenizer_folder: of an existing tokenizer; None: one is trained on the train documents.
    """
    parts = {source.name: split(source, data, seed) for source in SOURCES}
    train_documents = {name: train for name, (train, _) in parts.items()}
    if tokenizer_folder is not None:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    else:
        tokenizer = train_tokenizer(sample_for_vocabulary(train_documents, num_characters=12_000_000), VOCAB)
    tokenizer.save_pretrained(work / "tokenizer")
    (work / "tokens").mkdir(parents=True, exist_ok=True)
    statistics = {}
    for source in SOURCES:
        train, held_out = (encode(part, tokenizer) for part in parts[source.name])
        np.save(work / "tokens" / f"{source.name}.train.npy", train)
        np.save(work / "tokens" / f"{source.name}.held_out.npy", held_out)
        statistics[source.name] = {
            "share": source.share, "licence": source.licence, "documents": sum(map(len, parts[source.name])),
            "train_tokens": len(train), "held_out_tokens": len(held_out),
        }  # fmt: skip
        print(source.name, statistics[source.name], flush=True)
    (work / "sources.json").write_text(json.dumps(statistics, indent=2) + "\n")
    return statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds train/")
    parser.add_argument("--work", type=Path, required=True, help="folder for the tokenizer and the token arrays")
    parser.add_argument("--tokenizer", type=Path, default=None, help="folder of an existing one (default: train one)")
    parser.add_argument("--seed", type=int, default=0, help="order of the documents (default 0)")
    args = parser.parse_args()
    prepare(args.data, args.work, args.tokenizer, args.seed)


if __name__ == "__main__":
    main()
