"""Llama targets with random weights, of the shapes that the CPU figures are measured on.

    python benchmarks/peers/targets.py OUT [--shapes 111M 430M deep]

Writes OUT/NAME, a Hugging Face folder in bfloat16, for every shape. Embedding and LM head are tied, heads have 64 channels, and the
vocabulary has 8192 tokens. The time of a pass does not depend on what the weights say, so random ones do. A target of such a
size whose text and acceptance are those of a trained model is made by `benchmarks/pad_target.py`.
"""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES = {"111M": (8, 1024, 2816), "430M": (8, 2048, 5632), "deep": (32, 1024, 2816)}  # layers, hidden, mlp
HEAD_DIM, VOCAB, CONTEXT = 64, 8192, 1024


def config_of(layers: int, hidden: int, mlp: int, vocab: int = VOCAB) -> LlamaConfig:
    """The configuration of a shape. Raises ValueError for a width that heads of 64 channels do not fill."""
    if hidden % HEAD_DIM:
        raise ValueError(f"hidden is {hidden}; it must be a multiple of the {HEAD_DIM} channels of a head")
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_DIM,
        num_key_value_heads=hidden // HEAD_DIM,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def write_target(folder: Path, layers: int, hidden: int, mlp: int, vocab: int = VOCAB) -> float:
    """Write a folder with random weights, the same in every run. Returns the number of parameters in millions."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config_of(layers, hidden, mlp, vocab)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return model.num_parameters() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    for name in arguments.shapes:
        millions = write_target(arguments.out / name, *SHAPES[name])
        print(f"{arguments.out / name}: {millions:.0f}M parameters")


if __name__ == "__main__":
    main()
