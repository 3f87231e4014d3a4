"""The sources of the embedded model: their licences and shares, and how a row becomes a document.

Only sources in `SOURCES` are read, so a new file in the data folder is not read by accident.
"""

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 25
LONGEST_REQUESTED_STORY = 3500  # characters; about 900 tokens, so request and story fit the context

CHILDRENS_AUTHORS = frozenset({
    "Abbie Farwell Brown", "Anna Sewell", "Beatrix Potter", "Carlo Collodi", "Edith Nesbit", "Eleanor H. Porter",
    "Frances Hodgson Burnett", "George MacDonald", "Hans Christian Andersen", "J. M. Barrie", "Johanna Spyri",
    "Kenneth Grahame", "L. Frank Baum", "Lewis Carroll", "Louisa May Alcott", "Lucy Maud Montgomery",
})  # fmt: skip

STORY_LICENCES = frozenset({
    "Apache-2.0 (repo); texts Project Gutenberg", "CC-BY", "CDLA-Sharing-1.0", "Public Domain",
    "public-domain translation (no licence file in repo)",
})  # fmt: skip

REQUESTS = (
    "Tell me a story about {title}.",
    "Tell me a story called {title}.",
    "Write a short story with the title {title}.",
    "Please tell me the story of {title}.",
)
UNTITLED_REQUESTS = ("Tell me a story.", "Write a short story.", "Please tell me a short story for children.")


@dataclass(frozen=True)
class Source:
    """One named part of the data folder.

    name: in the field `source` of a row.
    file: in `train/`.
    share: of the training tokens, in [0, 1].
    """

    name: str
    file: str
    licence: str
    share: float


@dataclass(frozen=True)
class Document:
    """Either a plain `text`, or `messages` that the chat template renders.

    key: its hash decides whether the document is held out.
    """

    key: str
    text: str = ""
    messages: tuple[dict, ...] = ()

    @property
    def is_held_out(self) -> bool:
        """Whether the document is held out."""
        return zlib.crc32(self.key.strip().lower().encode()) % HELD_OUT_ONE_IN == 0


# Left out on purpose: CC BY-NC rows (alpaca_subset, new_codealpaca, code_alpaca_2k, alpaca_eval_outputs, lima);
# t0_p3_sample, whose upstream sets have many licences; the llamafactory demos, whose prompts and answers
# descend from Stanford Alpaca (CC BY-NC) and other sets although the repository that carries them is Apache-2.0.
SOURCES = (
    Source("african_storybook", "stories_simple.jsonl.gz", "CC BY", 0.03),
    Source("pratham_storyweaver", "stories_simple.jsonl.gz", "CC BY", 0.05),
    Source("tinystories_sample", "stories_simple.jsonl.gz", "CDLA-Sharing-1.0", 0.01),
    Source("grimm_fairy_tales", "stories_simple.jsonl.gz", "public domain", 0.10),
    Source("fairytaleqa_train", "stories_simple.jsonl.gz", "Apache-2.0, public-domain texts", 0.13),
    Source("story_requests", "stories_simple.jsonl.gz", "as the five sources of stories above", 0.10),
    Source("sgd", "dialogues.jsonl.gz", "CC BY-SA 4.0", 0.14),
    Source("taskmaster4", "dialogues.jsonl.gz", "CC BY 4.0", 0.02),
    Source("dolly_3k", "instruct_sft.jsonl.gz", "CC BY-SA 3.0", 0.08),
    Source("gpteacher_roleplay", "instruct_sft.jsonl.gz", "MIT", 0.07),
    Source("llms_from_scratch_instruct", "instruct_sft.jsonl.gz", "Apache-2.0", 0.01),
    Source("gsm8k_train", "instruct_sft.jsonl.gz", "MIT", 0.06),
    Source("thealgorithms_python", "code_python.jsonl.gz", "MIT", 0.09),
    Source("classic_books", "books_classic.jsonl.xz", "public domain", 0.11),
)


def documents(source: Source, data: Path) -> Iterator[Document]:
    """The documents of one source that its licences allow to use. Raises ValueError if its file is missing."""
    for row in read_rows(data / "train" / source.file):
        if source.name == "story_requests":
            yield from _requested(row)
        elif row["source"] == source.name and is_allowed(row):
            yield _document(row)


def is_allowed(row: dict) -> bool:
    """Whether a row may be used: decided by the licence of a story, and by the author of a book."""
    if row["source"] == "classic_books":
        return row["path"].split("/")[0] in CHILDRENS_AUTHORS
    return row.get("license") is None or row["license"] in STORY_LICENCES


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of a compressed JSONL file. Raises ValueError if it is missing."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; --data must name the folder that holds train/")
    opener = lzma.open if path.suffix == ".xz" else gzip.open
    with opener(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _document(row: dict) -> Document:
    if "messages" in row:
        return Document(key=row["messages"][0]["content"], messages=tuple(row["messages"]))
    text = _clean(row["text"])
    heading = f"{row['title'].strip()}\n\n" if row.get("title") else ""
    return Document(key=row.get("title") or row.get("path") or text, text=heading + text)


def _requested(row: dict) -> Iterator[Document]:
    """A short story as a request and its answer; it has the key of the plain story, so both are held out together."""
    if not is_allowed(row) or len(row["text"]) > LONGEST_REQUESTED_STORY:
        return
    key = _document(row).key
    choices = REQUESTS if row["title"] else UNTITLED_REQUESTS
    request = choices[zlib.crc32(row["text"].encode()) % len(choices)].format(title=row["title"].strip())
    answer = {"role": "assistant", "content": _clean(row["text"])}
    yield Document(key=key, messages=({"role": "user", "content": request}, answer))


def _clean(text: str) -> str:
    """The text without carriage returns and without the "##" at the end of African Storybook and StoryWeaver texts."""
    return text.replace("\r\n", "\n").strip().removesuffix("##").rstrip()
