"""What trunks and heads are worth on held-out documents, and in decoding. All in float32.

This file knows folders of models and heads. It refuses to know how they were trained.
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
    """Documents in blocks of `length` tokens, those of similar length together; with the document of each row."""
    blocks = Blocks(documents, length)
    owners = [document for document in range(len(documents)) for _ in blocks.of(document)]
    order = sorted(range(len(blocks)), key=lambda index: len(blocks[index].tokens))
    packed = Packed(blocks, (), tuple(order))
    for start in range(0, len(order), ROWS):
        chosen = order[start : start + ROWS]
        yield [owners[index] for index in chosen], packed.pad(chosen)


@torch.inference_mode()
def by_document(trunk: Path, documents: Sequence[np.ndarray], length: int) -> np.ndarray:
    """[documents, 3]: summed loss in nats, best guesses that were right, and predictions, of the next token."""
    model = load_model(trunk, "float32", "cpu")
    sums = torch.zeros(len(documents), 3, dtype=torch.float64)
    for owners, texts in batches(documents, length):
        logits = model(input_ids=texts.tokens, use_cache=False).logits[:, :-1]  # [rows, length - 1, vocab]
        counts, tokens = texts.loss_mask[:, 1:], texts.tokens[:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none") * counts
        found = [losses, (logits.argmax(-1) == tokens) & counts, counts]
        sums.index_add_(0, torch.tensor(owners), torch.stack([one.double().sum(1) for one in found], 1))
    return sums.numpy()


@torch.no_grad()
def by_depth(trunk: Path, heads: Path, documents: Sequence[np.ndarray], length: int) -> dict[str, Any]:
    """top1 by depth of heads that are told the true tokens, and tau of a chain of their best guesses down to each depth."""
    model = load_model(trunk, "float32", "cpu")
    drafter = load(heads).float().bind(EmbedHead(model)).eval()
    online, objective = Online(model, drafter.taps), Objective(hard=1.0)
    found = [drafter.loss(online(texts), objective)[1].stacked() for _, texts in batches(documents, length)]
    metrics = Metrics.of(torch.stack(found).sum(0))
    taus = 1 + (metrics.runs / metrics.counts).cumsum(0)
    return {
        "parameters": sum(weight.numel() for weight in drafter.parameters()),
        "top1": metrics.top1.tolist(),
        "tau": taus.tolist(),
    }


def decoded(trunk: Path, runs: Sequence[str], temperatures: Sequence[float], max_tokens: int) -> dict[str, list[report.Row]]:
    """By `HEADS@PLANNER`, a row for each temperature: what the trunk itself goes on to say behind the beginnings of stories."""
    target, tokenizer = Target.load(trunk, "float32", "cpu"), load_tokenizer(trunk)
    tasks = tuple(runner.Task(tuple(encode_prompt(tokenizer, case.prompt))) for case in suites.SUITES["stories"])
    found: dict[str, list[report.Row]] = {run: [] for run in runs}
    for temperature in temperatures:
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=0, ignore_eos=True)
        setup = runner.Setup(target, tasks, params)
        for row in report.rows(setup, runner.measure(setup, runner.prepare(setup, runs)))[1:]:
            found[row.run].append(row)
    return found
