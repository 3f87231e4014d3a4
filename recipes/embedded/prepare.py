"""From the data folder to a tokenizer and flat arrays of tokens, one pair (train, held out) per source.

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
    """Learn a byte-level BPE in which every digit is a token of its own, so that sums stay readable."""
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
    return document.text or "\n".join(m["content"] for m in document.messages)


def sample_for_vocabulary(parts: dict[str, list[Document]], num_characters: int) -> Iterable[str]:
    """Yield text of every source in proportion to its share in training, held-out documents excluded."""
    for source in SOURCES:
        wanted = num_characters * source.share
        for document in parts[source.name]:
            if wanted <= 0:
                break
            text = plain_text(document)[: int(wanted) + 1]
            wanted -= len(text)
            yield text


def encode(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Chain documents, each ended by <|endoftext|>. Returns [tokens] uint16."""
    texts = [tokenizer.apply_chat_template(list(d.messages), tokenize=False) if d.messages else d.text for d in documents]
    end = tokenizer.eos_token_id
    return np.array([i for ids in tokenizer(texts)["input_ids"] for i in (*ids, end)], dtype=np.uint16)


def split(source: Source, data: Path, seed: int) -> tuple[list[Document], list[Document]]:
    """Read one source, shuffle it, and part it into training and held-out documents."""
    found = list(documents(source, data))
    random.Random(f"{seed}/{source.name}").shuffle(found)
    return [d for d in found if not d.is_held_out], [d for d in found if d.is_held_out]


def prepare(data: Path, work: Path, known: Path | None = None, seed: int = 0) -> dict[str, dict]:
    """Write tokenizer/, tokens/ and sources.json under `work`; return what sources.json says.

    known: folder of a tokenizer to keep; None to learn one from the training documents.
    """
    parts = {source.name: split(source, data, seed) for source in SOURCES}
    training = {name: kept for name, (kept, _) in parts.items()}
    if known is not None:
        tokenizer = AutoTokenizer.from_pretrained(known)
    else:
        tokenizer = train_tokenizer(sample_for_vocabulary(training, num_characters=12_000_000), VOCAB)
    tokenizer.save_pretrained(work / "tokenizer")
    (work / "tokens").mkdir(parents=True, exist_ok=True)
    facts = {}
    for source in SOURCES:
        kept, held_out = (encode(part, tokenizer) for part in parts[source.name])
        np.save(work / "tokens" / f"{source.name}.train.npy", kept)
        np.save(work / "tokens" / f"{source.name}.held_out.npy", held_out)
        facts[source.name] = {
            "share": source.share, "licence": source.licence, "documents": sum(map(len, parts[source.name])),
            "train_tokens": len(kept), "held_out_tokens": len(held_out),
        }  # fmt: skip
        print(source.name, facts[source.name], flush=True)
    (work / "sources.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds train/")
    parser.add_argument("--work", type=Path, required=True, help="folder for the tokenizer and the token arrays")
    parser.add_argument("--tokenizer", type=Path, default=None, help="folder of one to keep (default: learn one)")
    parser.add_argument("--seed", type=int, default=0, help="order of the documents (default 0)")
    args = parser.parse_args()
    prepare(args.data, args.work, args.tokenizer, args.seed)


if __name__ == "__main__":
    main()
