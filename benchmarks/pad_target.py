"""Give a small Llama the cost of a larger one, with zeros: its logits stay, and with them its answers and the acceptance of drafts.

    python benchmarks/pad_target.py SOURCE OUT --hidden 1024 --mlp 2816 --layers 36

Weights go to the leading corner of larger ones; the other rows and columns are zeros, and so are the other channels of every hidden
state. Attention heads keep their size, and there are more of them. RMS norms average over the width, so their weights shrink by
sqrt(old / new) and their eps by old / new. With `--layers`, each layer of the source is followed by layers of zeros, which add
nothing and cost the same: layer `i` becomes layer `i * layers / old layers`. A forward reads every zero, so it costs what it costs
in a trained model of that size, and a drafter's level has its share of it. Heads for the source are widened by `pad_heads.py`.
Nothing is written unless the logits are the same in float32; in bf16 they differ by the rounding of the norms' weights. Numbers
measured with such a target must be labelled "padded".
"""

import argparse
import copy
import math
import re
import shutil
from pathlib import Path

import torch
from pad_heads import TOLERANCE, widen
from transformers import LlamaConfig, LlamaForCausalLM

from headstart.target.loading import load_model

COPIED = (".json", ".jinja", ".model", ".txt")  # endings of what belongs to a tokenizer and its chat template


def padded_config(config: LlamaConfig, hidden: int, mlp: int, layers: int) -> LlamaConfig:
    """The configuration of the padded model.

    hidden, mlp: width of hidden states and of MLPs.
    layers: number of layers.
    Raises ValueError for a model that is no Llama, and for sizes that it does not fit into.
    """
    if config.model_type != "llama":
        raise ValueError(f"the source is a {config.model_type} model; only llama models can be padded")
    unit = config.head_dim * config.num_attention_heads // config.num_key_value_heads  # channels of heads that share keys
    least = max(config.hidden_size, config.head_dim * config.num_attention_heads)
    if hidden < least or hidden % unit:
        raise ValueError(f"--hidden is {hidden}; it must be a multiple of {unit}, of {least} or more")
    if mlp < config.intermediate_size:
        raise ValueError(f"--mlp is {mlp}; it must be {config.intermediate_size} or more")
    if layers < 1 or layers % config.num_hidden_layers:
        raise ValueError(f"--layers is {layers}; it must be a multiple of {config.num_hidden_layers}")
    padded = copy.deepcopy(config)
    padded.hidden_size, padded.intermediate_size, padded.num_hidden_layers = hidden, mlp, layers
    padded.num_attention_heads, padded.num_key_value_heads = hidden // config.head_dim, hidden // unit
    padded.rms_norm_eps = config.rms_norm_eps * config.hidden_size / hidden
    return padded


@torch.no_grad()
def padded(small: LlamaForCausalLM, hidden: int, mlp: int, layers: int) -> LlamaForCausalLM:
    """The padded model, in the dtype of the small one. Raises as `padded_config` does."""
    config = padded_config(small.config, hidden, mlp, layers)
    times = layers // small.config.num_hidden_layers
    shrink = math.sqrt(small.config.hidden_size / hidden)
    large = LlamaForCausalLM(config).to(small.dtype)
    for weight in large.parameters():
        weight.zero_()
    for name, weight in small.named_parameters():
        place = re.sub(r"(?<=layers\.)\d+", lambda number: str(int(number[0]) * times), name)
        like = large.get_parameter(place)
        like.copy_(widen(weight * shrink if "norm" in name else weight, tuple(like.shape)))
    return large.eval()


@torch.no_grad()
def gap(small: LlamaForCausalLM, large: LlamaForCausalLM, length: int = 48) -> float:
    """The largest difference of logits on one random text, relative to the largest logit."""
    tokens = torch.randint(0, small.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    expected, actual = small(tokens).logits, large(tokens).logits
    return float((expected - actual).abs().max() / expected.abs().max())


def pad_target(source: Path, out: Path, hidden: int, mlp: int, layers: int | None) -> tuple[int, float]:
    """Write the padded model in the dtype of the source, with the source's tokenizer.

    layers: None: as many as the source has.
    Returns the number of its parameters, and the relative difference of logits in float32.
    Raises ValueError, before anything is written, for a model or sizes that cannot be padded, and where the logits differ.
    """
    small = load_model(source, device="cpu")
    dtype = small.dtype
    small = small.float()
    large = padded(small, hidden, mlp, layers or small.config.num_hidden_layers)
    worst = gap(small, large)
    if not worst <= TOLERANCE:
        raise ValueError(f"padding changed the model: its logits differ by {worst:.1e} of the largest")
    large.to(dtype).save_pretrained(out)
    for file in source.iterdir():
        if file.suffix in COPIED and file.name != "config.json" and not file.name.endswith(".index.json"):
            shutil.copy(file, out / file.name)
    return large.num_parameters(), worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of a Llama")
    parser.add_argument("out", type=Path)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--mlp", type=int, default=2816)
    parser.add_argument("--layers", type=int, help="default: as many as the source has")
    arguments = parser.parse_args()
    try:
        count, worst = pad_target(arguments.source, arguments.out, arguments.hidden, arguments.mlp, arguments.layers)
    except ValueError as error:
        parser.error(str(error))
    print(f"{arguments.out}: {count / 1e6:.0f}M parameters; logits differ by {worst:.1e} of the largest")


if __name__ == "__main__":
    main()
