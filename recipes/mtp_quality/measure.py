"""Measures trunks and heads on held-out documents and in decoding, all in float32.

The module must not import how they were trained.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from headstart.bench import report, runner, suites
from headstart.drafters.parts.losses import Metrics, Objective
from headstart.formats import load
from headstart.speculation.params import SamplingParams
from headstart.target.embed_head import EmbedHead
from headstart.target.loading import load_model
from headstart.target.target import Target
from headstart.target.tokenizer_loading import load_tokenizer
from headstart.text.tokenizer import encode_prompt
from headstart.training.dataset import TextBatch
from headstart.training.features import Online
from headstart.training.packing import Blocks, Packed

ROWS = 16


def batches(documents: Sequence[np.ndarray], length: int) -> Iterator[tuple[list[int], TextBatch]]:
    """Batches of documents in blocks of `length` tokens, sorted by length, each with the index of every row's document."""
    blocks = Blocks(documents, length)
    owners = [document for document in range(len(documents)) for _ in blocks.of(document)]
    order = sorted(range(len(blocks)), key=lambda index: len(blocks[index].tokens))
    packed = Packed(blocks, (), tuple(order))
    for start in range(0, len(order), ROWS):
        chosen = order[start : start + ROWS]
        yield [owners[index] for index in chosen], packed.pad(chosen)


@torch.inference_mode()
def by_document(trunk: Path, documents: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Sums over each document, [documents, 3]: cross-entropy of the next token in nats, correct top-1 tokens, predictions."""
    model = load_model(trunk, "float32", "cpu")
    sums = torch.zeros(len(documents), 3, dtype=torch.float64)
    for owners, texts in batches(documents, length):
        logits = model(input_ids=texts.tokens, use_cache=False).logits[:, :-1]  # [rows, length - 1, vocab]
        loss_mask, tokens = texts.loss_mask[:, 1:], texts.tokens[:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none") * loss_mask
        columns = [losses, (logits.argmax(-1) == tokens) & loss_mask, loss_mask]
        sums.index_add_(0, torch.tensor(owners), torch.stack([column.double().sum(1) for column in columns], 1))
    return sums.numpy()


@torch.no_grad()
def by_depth(trunk: Path, heads: Path, documents: Sequence[np.ndarray], length: int) -> dict[str, Any]:
    """Values of heads under teacher forcing: top-1 by depth, and tau of a chain of top-1 tokens down to each depth."""
    model = load_model(trunk, "float32", "cpu")
    drafter = load(heads).float().bind(EmbedHead(model)).eval()
    online, objective = Online(model, drafter.taps), Objective(hard=1.0)
    sums = [drafter.loss(online(texts), objective)[1].stacked() for _, texts in batches(documents, length)]
    metrics = Metrics.of(torch.stack(sums).sum(0))
    taus = 1 + (metrics.runs / metrics.counts).cumsum(0)
    return {
        "parameters": sum(weight.numel() for weight in drafter.parameters()),
        "top1": metrics.top1.tolist(),
        "tau": taus.tolist(),
    }


def decoded(trunk: Path, runs: Sequence[str], temperatures: Sequence[float], max_tokens: int) -> dict[str, list[report.Row]]:
    """Decodes of continuations of stories: by `HEADS@PLANNER`, one row for each temperature."""
    target, tokenizer = Target.load(trunk, "float32", "cpu"), load_tokenizer(trunk)
    tasks = tuple(runner.Task(tuple(encode_prompt(tokenizer, case.prompt))) for case in suites.SUITES["stories"])
    rows: dict[str, list[report.Row]] = {run: [] for run in runs}
    for temperature in temperatures:
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=0, ignore_eos=True)
        setup = runner.Setup(target, tasks, params)
        for row in report.rows(setup, runner.measure(setup, runner.prepare(setup, runs)))[1:]:
            rows[row.run].append(row)
    return rows
