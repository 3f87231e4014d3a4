"""Published heads for tests: written from random tensors, and compared with a formula on a text and a target."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from heads import Forced
from safetensors.torch import save_file
from torch import Tensor

from headstart import formats
from headstart.drafters.parts.losses import Batch
from headstart.speculation.tree import Kept
from headstart.target.cache import Seating
from headstart.target.embed_head import EmbedHead
from headstart.target.loading import load_model
from headstart.target.target import Target

HIDDEN, VOCAB = 32, 320  # of folders.write_model
Tensors = dict[str, Tensor]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.3


def write(folder: Path, name: str, tensors: Tensors, **config: object) -> Path:
    """Write a file of tensors, safetensors or a pickle by its suffix, and `config.json`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    else:
        torch.save(tensors, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class ImportTrial:
    """A target, texts of random tokens [2, 9], and the target's last hidden states. outputs: hidden states of all its layers."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.folder = folder
        self.model = load_model(folder, dtype, "cpu")
        self.target_info = formats.describe_target(self.model)
        self.embed_head = EmbedHead(self.model)
        self.tokens = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            output = self.model.model(input_ids=self.tokens, output_hidden_states=True)
            self.states, self.outputs = output.last_hidden_state, output.hidden_states[1:]  # [rows, length, hidden]
            self.embedded = self.embed_head.embed(self.tokens)

    def read(self, source: Path, taps: Sequence[int] = ()) -> Any:
        """The heads in a folder, imported for this target, in its dtype."""
        published = formats.published_in(source).for_target(self.target_info, lambda: self.embed_head, taps)
        return published.read(self.target_info, self.model.config).to(self.model.dtype).bind(self.embed_head)

    def logits(self, source: Path) -> list[Tensor]:
        """Logits of the imported heads at every position, [heads] of [rows, length, vocab]."""
        heads = self.read(source)
        read = torch.cat([self.outputs[tap] if tap >= 0 else self.states for tap in heads.taps], -1)
        batch = Batch(self.tokens, torch.ones_like(self.tokens, dtype=torch.bool), read, self.states)
        with torch.no_grad():
            return [output.output_head(output.states) for output in heads.states(batch)]

    def drafted(self, source: Path, steps: int) -> list[Tensor]:
        """Logits of the imported heads while they draft the true text after every position, [steps] of [rows, positions, vocab].

        Hidden states up to the position are given in two pieces; of what follows, the heads get the tokens alone.
        """
        heads, target = self.read(source), Target(load_model(self.folder, self.model.dtype, "cpu"), check=False)
        texts, positions = self.tokens.tolist(), range(self.tokens.shape[1] - steps)
        anchors = [(row, position + 1) for row in range(len(texts)) for position in positions]  # of the roots
        seating = Seating(len(anchors), 64 * len(anchors))
        for _ in anchors:
            seating.take(64)
        heads.attach(target, seating)
        for share in (0.0, 0.5), (0.5, 1.0):
            spans = [(seat, row, *(int(root * part) for part in share)) for seat, (row, root) in enumerate(anchors)]
            self._extend(heads, [(seat, row, first, last) for seat, row, first, last in spans if first < last])
        forced = Forced([[*texts[row], 0] for row, _ in anchors], tuple(root for _, root in anchors), (steps,) * len(anchors))
        heads.propose(forced)
        by_step = [torch.stack([forced.logits[row, step + 1] for row in range(len(anchors))]) for step in range(steps)]
        return [logits.unflatten(0, (len(texts), len(positions))) for logits in by_step]

    def _extend(self, heads: Any, spans: Sequence[tuple[int, int, int, int]]) -> None:
        """Give the heads pieces of texts, (seat, row, first, last), with the target's hidden states there."""
        read = torch.cat([self.outputs[tap] if tap >= 0 else self.states for tap in heads.taps], -1)
        pieces = tuple(tuple(self.tokens[row, first : last + 1].tolist()) for _, row, first, last in spans)
        features = torch.cat([read[row, first:last] for _, row, first, last in spans])
        seats, starts = tuple(seat for seat, *_ in spans), tuple(first for _, _, first, _ in spans)
        heads.extend(Kept(seats, pieces, starts, (), (), features, features.device))

    def refusal(self, source: Path, taps: Sequence[int] = ()) -> str:
        """The error message with which the heads are refused."""
        try:
            self.read(source, taps)
        except ValueError as error:
            return str(error)
        raise AssertionError(f"{source} was not refused")
