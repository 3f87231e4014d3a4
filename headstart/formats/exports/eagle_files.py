"""What the exports of EAGLE heads (EAGLE-1 and EAGLE-2, whose files are alike) have in common."""

from __future__ import annotations

from headstart.formats.exports.base import Subject, TensorFile
from headstart.formats.exports.llama_block import layer_names

NAMES = {"block.": "", "embedding.": "embed_tokens."}


def eagle_tensors(subject: Subject) -> TensorFile:
    """The tensors, in the names of their authors: without a first norm, a final norm and an LM head."""
    file = TensorFile()
    for ours, theirs in layer_names([*subject.tensors], NAMES).items():
        file.put(ours, theirs, subject.tensors[ours])
    return file
