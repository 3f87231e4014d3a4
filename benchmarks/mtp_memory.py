"""Memory of each further head while a trunk is trained with it: head after head, and all in one graph.

    python benchmarks/mtp_memory.py [--vocab 32000] [--hidden 256] [--heads 0 1 3]

One step of 2,048 tokens in float32 on the CPU, each in a process of its own: by how much the peak of its memory rises.
"""

import argparse
import resource
import subprocess
import sys

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from headstart.drafters.mtp_parallel import ParallelConfig, ParallelMtp
from headstart.drafters.parts.decoder import block_of
from headstart.target.embed_head import EmbedHead
from headstart.training.dataset import TextBatch
from headstart.training.pretrain_loss import PretrainLoss

ROWS, LENGTH = 4, 512


def peak() -> float:
    """Peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def head_after_head(loss_module: PretrainLoss, tokens: torch.Tensor) -> None:
    """A training step of `headstart pretrain`."""
    loss, _ = loss_module(TextBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), ()))
    loss.backward()


def one_graph(loss_module: PretrainLoss, tokens: torch.Tensor) -> None:
    """The same losses as one graph, with all logits."""
    out = loss_module.trunk(tokens, output_hidden_states=True, use_cache=False)
    loss = cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    for heads in loss_module.heads.values():
        for depth in range(heads.depth):
            states = heads.head(depth)(inputs_embeds=out.hidden_states[-2], use_cache=False).last_hidden_state
            logits = loss_module.trunk.lm_head(states[:, : -depth - 2])
            loss = loss + cross_entropy(logits.flatten(0, 1), tokens[:, depth + 2 :].flatten())
    loss.backward()


STEPS = {"head-after-head": head_after_head, "one-graph": one_graph}


def measure(way: str, num_heads: int, vocab: int, hidden: int) -> float:
    """MiB that one step adds to the peak."""
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=4,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, tie_word_embeddings=True,
    )  # fmt: skip
    trunk = LlamaForCausalLM(config)
    kind = ParallelMtp(ParallelConfig(num_heads=max(1, num_heads), block=block_of(config)), hidden, vocab).bind(EmbedHead(trunk))
    loss_module = PretrainLoss(trunk, {"mtp-parallel": kind} if num_heads else {}, lambda progress: 1.0, 1.0)
    before = peak()
    STEPS[way](loss_module, torch.randint(vocab, (ROWS, LENGTH)))
    return peak() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--heads", type=int, nargs="+", default=[0, 1, 3])
    parser.add_argument("--one", nargs=2, metavar=("WAY", "HEADS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(measure(args.one[0], int(args.one[1]), args.vocab, args.hidden))
        return
    sizes = ["--vocab", str(args.vocab), "--hidden", str(args.hidden)]
    for heads in args.heads:
        peaks = [
            float(
                subprocess.run([sys.executable, __file__, *sizes, "--one", way, str(heads)], check=True, capture_output=True).stdout
            )
            for way in STEPS
        ]
        print(f"{heads} heads: {peaks[0]:6.0f} MiB head after head, {peaks[1]:6.0f} MiB in one graph", flush=True)


if __name__ == "__main__":
    main()
