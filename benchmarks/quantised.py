"""What heads are worth to a model with fewer bits than the one they were trained for: tau with the model as it is, with its linears
in 8 bits and in 4 (weights only, torchao), by the same heads on the same prompts.

    python benchmarks/quantised.py --drafter mtp --drafter hydra --limit 8

Prints a line per drafter and temperature. Texts differ between the models, so every answer has all its tokens (no stop token).
"""

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

import headstart
from headstart.bench.suites import load_cases
from headstart.engine.drafter_loading import folder_of, heads_in
from headstart.target.loading import embedded, load_model
from headstart.target.target import Target
from headstart.target.tokenizer_loading import load_tokenizer

BITS = (16, 8, 4)


def model_of(folder: Path, bits: int) -> torch.nn.Module:
    """In bfloat16, or with linears of so many bits, and then its head in eight; a group of 32 weights shares a scale of 4 bits."""
    model = load_model(folder, dtype="bfloat16", device="cpu")
    if bits < 16:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

        quantize_(model.model, IntxWeightOnlyConfig(torch.int4, PerGroup(32)) if bits == 4 else Int8WeightOnlyConfig())
        quantize_(model, Int8WeightOnlyConfig(), lambda module, name: name == "lm_head")
    return model


def taus(folder: Path, bits: int, drafters: list[str], prompts: list, temperature: float, tokens: int) -> Iterator[float]:
    """Of each drafter, on one model."""
    target = Target(model_of(folder, bits))
    for name in drafters:
        llm = headstart.LLM(headstart.Engine(target, heads_in(folder_of(name), target)), load_tokenizer(folder))
        llm.generate(prompts, temperature=temperature, seed=1, max_tokens=tokens, ignore_eos=True)
        yield llm.stats.tau


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=embedded("target"), help="folder; the embedded model by default")
    parser.add_argument("--drafter", action="append", required=True, help="folder of heads, or a method's name; again for more")
    parser.add_argument("--prompts", default="stories", help="a built-in suite, or a JSONL file")
    parser.add_argument("--limit", type=int, default=8, help="how many of them")
    parser.add_argument("--tokens", type=int, default=96, help="of each answer")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # heads say that they were trained for other weights, which is the question here
    prompts = [case.prompt for case in load_cases(arguments.prompts, arguments.limit)]
    print(f"torch {torch.__version__}, {len(prompts)} prompts of {arguments.prompts}, {arguments.tokens} tokens each; tau by bits")
    print(f"{'drafter':<24}{'T':>5}" + "".join(f"{bits:>8}" for bits in BITS))
    for temperature in (0.0, 0.7):
        columns = [list(taus(arguments.model, bits, arguments.drafter, prompts, temperature, arguments.tokens)) for bits in BITS]
        for name, *found in zip(arguments.drafter, *columns, strict=True):
            print(f"{Path(name).name:<24}{temperature:>5}" + "".join(f"{tau:>8.3f}" for tau in found), flush=True)


if __name__ == "__main__":
    main()
