"""Widen heads with zeros, for a target that was widened with zeros: what the small ones say, at the cost of large ones.

    python benchmarks/pad_heads.py HEADS PADDED_TARGET OUT

A target whose embeddings and final states are those of a smaller model, followed by zeros, says what that one says and costs what
its width costs. So do these heads: every weight goes to the leading corner of a larger one. Where vectors stand side by side
(Hydra, MTP, EAGLE), each one's columns move to its new place; norms average over the width, so their weights shrink by
sqrt(old / new) and their eps by old / new. Nothing is written unless the logits are the same. Say "padded" wherever such a
number is printed.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad
from transformers import AutoConfig

from headstart.drafters.parts.heads import Heads
from headstart.drafters.parts.losses import Batch
from headstart.formats import TargetInfo, describe, describe_target, load, save
from headstart.speculation.calibration import load_plan, save_plan
from headstart.target.embed_head import EmbedHead
from headstart.target.loading import load_model
from headstart.target.tokenizer_loading import load_tokenizer

TOLERANCE = 1e-3  # of logits, relative to the largest


def widen(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`weight` in the leading corner of zeros."""
    result = weight.new_zeros(shape)
    result[tuple(map(slice, weight.shape))] = weight
    return result


def widen_side_by_side(weight: Tensor, old: int, shape: tuple[int, ...]) -> Tensor:
    """[rows, count * old], which reads `count` vectors side by side -> [more rows, count * more]."""
    blocks = weight.unflatten(1, (-1, old))
    return widen(blocks, (shape[0], blocks.shape[1], shape[1] // blocks.shape[1])).flatten(1)


def is_side_by_side(name: str, weight: Tensor, like: Tensor, old: int, hidden: int) -> bool:
    """Whether a matrix reads several vectors of the target's width."""
    count = weight.shape[-1] // old
    reads = (
        "fuse" in name
        or "eh_proj" in name
        or name.startswith("fc.")
        or name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    )
    return reads and weight.dim() == 2 and weight.shape[1] == count * old and like.shape[1] == count * hidden


def widened(heads: Heads, hidden: int) -> Heads:
    """The same heads for states of `hidden` numbers, in float32. Raises ValueError where that is no larger or does not fit."""
    if hidden <= heads.hidden:
        raise ValueError(f"the heads are for a hidden size of {heads.hidden} and the target has {hidden}; nothing to widen")
    large = type(heads)(widened_config(heads.config, heads.hidden, hidden), hidden, heads.vocab)
    shrink = math.sqrt(heads.hidden / hidden)
    weights: dict[str, Tensor] = {}
    for name, like in large.state_dict().items():
        weight = heads.state_dict()[name]
        if not weight.is_floating_point():
            weights[name] = weight  # tokens of a vocabulary
        elif is_side_by_side(name, weight, like, heads.hidden, hidden):
            weights[name] = widen_side_by_side(weight.float(), heads.hidden, tuple(like.shape))
        else:
            weight = weight.float()
            weights[name] = widen(weight * shrink if "norm" in name else weight, tuple(like.shape))
    large.load_state_dict(weights)
    large.calibration = heads.calibration
    return large.eval()


def widened_config(config: Any, old: int, hidden: int) -> Any:
    """Settings of a decoder layer grow with it: more attention heads of the same size, an MLP in proportion."""
    if getattr(config, "prefix", None) is not None:
        grown = widened_layer(config.prefix, old, hidden)
        return config.model_copy(update={"prefix": config.prefix.model_copy(update=grown)})
    if getattr(config, "block", None) is not None:
        layer = AutoConfig.for_model(**config.block)  # settings that are a family's own are not in the folder
        grown = widened_layer(layer, old, hidden)
        head = {"head_dim": getattr(layer, "head_dim", None) or old // layer.num_attention_heads}
        return config.model_copy(update={"block": {**config.block, **grown, **head, "hidden_size": hidden}})
    return config


def widened_layer(layer: Any, old: int, hidden: int) -> dict[str, Any]:
    """Raises ValueError where heads of the same size do not fill the new width."""
    counts = {name: getattr(layer, name) * hidden for name in ("num_attention_heads", "num_key_value_heads")}
    if odd := [name for name, count in counts.items() if count % old]:
        raise ValueError(f"{odd[0]} is {getattr(layer, odd[0])}, which does not grow from {old} to {hidden} in whole heads")
    grown: dict[str, Any] = {name: count // old for name, count in counts.items()}
    grown["intermediate_size"] = math.ceil(layer.intermediate_size * hidden / old)
    grown["rms_norm_eps"] = layer.rms_norm_eps * old / hidden
    return grown


class Narrow:
    """The ends of the small model inside a padded one. Raises ValueError for a target that is not padded behind `hidden`."""

    parameters = ()  # nothing learns here

    def __init__(self, embed_head: EmbedHead, hidden: int) -> None:
        self._embed_head, self.hidden, self.vocab = embed_head, hidden, embed_head.vocab
        table = embed_head.embed(torch.arange(embed_head.vocab))
        if table[:, hidden:].any() or embed_head.lm_head_weight[:, hidden:].any():
            raise ValueError(f"the target is not padded: behind {hidden} numbers, its embeddings or its head are not zero")
        self._table, self.weight = table[:, :hidden], embed_head.lm_head_weight[:, :hidden]

    def embed(self, tokens: Tensor) -> Tensor:
        return self._table[tokens]

    def project(self, states: Tensor) -> Tensor:
        return self.finish(linear(states, self.weight))

    def scale_logits(self, logits: Tensor) -> Tensor:
        return self._embed_head.scale_logits(logits)


@torch.no_grad()
def gap(small: Heads, large: Heads, length: int = 12) -> float:
    """The largest difference of their logits on one random text, relative to the largest logit."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, length, len(small.taps), small.hidden, generator=generator)
    tokens = torch.randint(0, small.vocab, (1, length), generator=generator)
    counts = torch.ones_like(tokens, dtype=torch.bool)
    wide = pad(states, (0, large.hidden - small.hidden))
    texts = [Batch(tokens, counts, read.flatten(2), read[:, :, -1]) for read in (states, wide)]
    pairs = zip(small.states(texts[0]), large.states(texts[1]), strict=True)
    worst = 0.0
    for mine, theirs in pairs:
        expected, found = mine.project(mine.states[0]), theirs.project(theirs.states[0])
        worst = max(worst, float((expected - found).abs().max() / expected.abs().max()))
    return worst


def check_target(heads: TargetInfo, target: TargetInfo) -> None:
    """Raise ValueError where the padded target cannot be theirs, only wider."""
    for what in ("vocab", "layers", "tokenizer"):
        mine, its = getattr(heads, what), getattr(target, what)
        if None not in (mine, its) and mine != its:
            raise ValueError(f"the heads are for {heads.name} with {what} {mine}, but {target.name} has {its}")


def pad_heads(source: Path, target: Path, out: Path) -> float:
    """Write widened heads and what was measured of the small ones; the gap of their logits, in float32.

    Raises ValueError, before anything is written, where the target is no padded one of theirs or the logits differ."""
    described, small = describe(source), load(source).float()
    model = load_model(target, dtype="float32", device="cpu")
    target_info = describe_target(model, load_tokenizer(target))
    check_target(described.target, target_info)
    embed_head = EmbedHead(model)
    large = widened(small, embed_head.hidden).bind(embed_head)
    worst = gap(small.bind(Narrow(embed_head, small.hidden)), large)
    if not worst <= TOLERANCE:
        raise ValueError(f"widening changed what the heads say: their logits differ by {worst:.1e} of the largest")
    plan = load_plan(source)
    save(out, large, target_info, {**described.training, "padded": True})
    if plan is not None:
        save_plan(out, plan)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heads", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    try:
        worst = pad_heads(arguments.heads, arguments.target, arguments.out)
    except ValueError as error:
        parser.error(str(error))
    print(f"{arguments.out}: logits differ by {worst:.1e} of the largest")


if __name__ == "__main__":
    main()
