"""tau (acceptance length) of heads on a quantised model: with the model that they were trained for, and with its linear layers in 8
and in 4 bits (weights only, torchao), by the same heads on the same prompts.

    python benchmarks/quantised.py --drafter mtp --drafter hydra --limit 8

Prints a line per drafter and temperature. Texts differ between the models, so stop tokens are ignored.
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
    """The model in bfloat16, or quantised: linear layers in 8 or 4 bits (groups of 32 weights), the LM head in 8."""
    model = load_model(folder, dtype="bfloat16", device="cpu")
    if bits < 16:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

        quantize_(model.model, IntxWeightOnlyConfig(torch.int4, PerGroup(32)) if bits == 4 else Int8WeightOnlyConfig())
        quantize_(model, Int8WeightOnlyConfig(), lambda module, name: name == "lm_head")
    return model


def taus(folder: Path, bits: int, drafters: list[str], prompts: list, temperature: float, tokens: int) -> Iterator[float]:
    """tau of each drafter, on one model."""
    target = Target(model_of(folder, bits))
    for name in drafters:
        llm = headstart.LLM(headstart.Engine(target, heads_in(folder_of(name, folder), target)), load_tokenizer(folder))
        llm.generate(prompts, temperature=temperature, seed=1, max_tokens=tokens, ignore_eos=True)
        yield llm.stats.tau


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=embedded("target"), help="folder; default: the embedded model")
    parser.add_argument("--drafter", action="append", required=True, help="folder of heads, or a method's name; may be repeated")
    parser.add_argument("--prompts", default="stories", help="a built-in suite, or a JSONL file")
    parser.add_argument("--limit", type=int, default=8, help="only the first N prompts")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of each answer")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # that the heads were trained for other weights, which is the point here
    prompts = [case.prompt for case in load_cases(arguments.prompts, arguments.limit)]
    print(f"torch {torch.__version__}, {len(prompts)} prompts of {arguments.prompts}, {arguments.tokens} tokens each; tau by bits")
    print(f"{'drafter':<24}{'T':>5}" + "".join(f"{bits:>8}" for bits in BITS))
    for temperature in (0.0, 0.7):
        columns = [list(taus(arguments.model, bits, arguments.drafter, prompts, temperature, arguments.tokens)) for bits in BITS]
        for name, *taus_by_bits in zip(arguments.drafter, *columns, strict=True):
            print(f"{Path(name).name:<24}{temperature:>5}" + "".join(f"{tau:>8.3f}" for tau in taus_by_bits), flush=True)


if __name__ == "__main__":
    main()
