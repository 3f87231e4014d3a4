"""The numbers of the model cards: held-out loss per source, and how often the draft model agrees with its target.

python -m recipes.embedded.measure --work WORK --target FOLDER --draft FOLDER
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

WINDOW = 512
MOST_WINDOWS = 24  # per source: enough for two digits within seconds


def load_streams(work: Path, part: str) -> dict[str, np.ndarray]:
    """The token arrays by source, [tokens] uint16 each. part: "train" or "held_out". Raises ValueError if there are none."""
    files = sorted((work / "tokens").glob(f"*.{part}.npy"))
    if not files:
        raise ValueError(f"{work / 'tokens'} holds no *.{part}.npy; run recipes.embedded.prepare first")
    return {file.name.removesuffix(f".{part}.npy"): np.load(file, mmap_mode="r") for file in files}


def windows(stream: np.ndarray) -> Iterator[Tensor]:
    """The first MOST_WINDOWS pieces of a stream, [1, WINDOW + 1] int64, the last may be shorter. stream: [tokens]."""
    for start in range(0, len(stream) - 1, WINDOW)[:MOST_WINDOWS]:
        yield torch.from_numpy(stream[start : start + WINDOW + 1].astype(np.int64))[None]


@torch.inference_mode()
def held_out_losses(model: LlamaForCausalLM, streams: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean loss of each source in nats per token. streams: [tokens] by source."""
    losses = {}
    for name, stream in streams.items():
        pieces = list(windows(stream))
        total = sum(
            F.cross_entropy(model(piece[:, :-1]).logits[0].float(), piece[0, 1:], reduction="sum").item() for piece in pieces
        )
        losses[name] = round(total / sum(piece.shape[1] - 1 for piece in pieces), 3)
    return losses


@torch.inference_mode()
def agreement(target: LlamaForCausalLM, draft: LlamaForCausalLM, streams: dict[str, np.ndarray]) -> dict[str, dict]:
    """How often the draft model agrees with the target, by source.

    streams: [tokens] by source.

    `greedy`: share of equal top-1 tokens. `sampled`: mean of sum(min(p, q)), the acceptance rate under sampling.
    """
    shares = {}
    for name, stream in streams.items():
        pairs = [(target(p[:, :-1]).logits[0].float(), draft(p[:, :-1]).logits[0].float()) for p in windows(stream)]
        same = torch.cat([t.argmax(-1) == d.argmax(-1) for t, d in pairs])
        overlap = torch.cat([torch.minimum(t.softmax(-1), d.softmax(-1)).sum(-1) for t, d in pairs])
        shares[name] = {"greedy": round(same.float().mean().item(), 3), "sampled": round(overlap.mean().item(), 3)}
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder that prepare filled")
    parser.add_argument("--target", type=Path, required=True, help="model folder")
    parser.add_argument("--draft", type=Path, required=True, help="model folder")
    args = parser.parse_args()
    target, draft = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (args.target, args.draft)
    )
    streams = load_streams(args.work, "held_out")
    report = {
        "target_loss": held_out_losses(target, streams),
        "draft_loss": held_out_losses(draft, streams),
        "agreement": agreement(target, draft, streams),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
