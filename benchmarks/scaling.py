"""Memory, disk and time of training heads, by method and size of the target: the tables of docs/scaling.md.

python benchmarks/scaling.py                                # the page's tables
python benchmarks/scaling.py --target FOLDER --tokens 4096  # of another target, and other batches
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from headstart.training.scaling import Sizes, disk, memory, operations

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "medusa, own projections": ("medusa", {}),
    "medusa, shared": ("medusa", {"projection": "shared"}),
    "hydra++, shared": ("hydra++", {"projection": "shared"}),
    "eagle": ("eagle", {}),
    "eagle3, draft_vocab 32,000": ("eagle3", {"draft_vocab": 32_000}),
    "mtp, depth 3": ("mtp", {"depth": 3}),
}
SHAPES = {"1B": (2048, 16, 8192, 32, True), "8B": (4096, 32, 14336, 32, False), "70B": (8192, 80, 28672, 64, False)}
TOKENS = 8 * 2048  # of a batch
BUDGET = 100_000_000  # tokens of a run
SPEED = 400e12  # operations a second that a GPU reaches, about 40 % of what an H100 is sold with in bfloat16


def targets() -> dict[str, Any]:
    """Configurations with the sizes of Llama 3."""
    from transformers import LlamaConfig

    common = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
    return {
        name: LlamaConfig(
            hidden_size=hidden, num_hidden_layers=layers, intermediate_size=wide, num_attention_heads=heads,
            tie_word_embeddings=tied, **common,
        )
        for name, (hidden, layers, wide, heads, tied) in SHAPES.items()
    }  # fmt: skip


def tables(configs: dict[str, Any], tokens: int) -> Iterator[str]:
    """A table of each target."""
    for name, config in configs.items():
        rows = [row(label, Sizes.of(config, method, settings), tokens) for label, (method, settings) in METHODS.items()]
        yield "\n".join([f"**{name}**", "", HEAD, *rows])


HEAD = (
    "| method | trained weights | 1 GPU | 8 GPUs, FSDP2 | 64 GPUs, FSDP2 | 1 GPU, stored features | features on disk | "
    "GPU hours, beside | of it, target |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def row(label: str, sizes: Sizes, tokens: int) -> str:
    """A line: memory of a process in GB, disk in KB a token and TB a run, hours of all GPUs together."""
    cells = [
        memory(sizes, tokens),
        memory(sizes, tokens, processes=8, here=8),
        memory(sizes, tokens, processes=64, here=8),
        memory(sizes, tokens, is_stored=True),
    ]
    target, heads = operations(sizes)
    hours = (target + heads) * BUDGET / SPEED / 3600
    store = f"{disk(sizes) / 1e3:.1f} KB, {disk(sizes) * BUDGET / 1e12:.1f} TB"
    gigabytes = " | ".join(f"{cell.total / 1e9:,.0f} GB" for cell in cells)
    return f"| {label} | {sizes.heads / 1e6:,.0f} M | {gigabytes} | {store} | {hours:,.1f} | {target / (target + heads):.0%} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="folder or hub id of another target")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a batch, with padding")
    options = parser.parse_args()
    configs = targets()
    if options.target is not None:
        from transformers import AutoConfig

        configs = {options.target: AutoConfig.from_pretrained(options.target)}
    print("\n\n".join(tables(configs, options.tokens)))


if __name__ == "__main__":
    main()
