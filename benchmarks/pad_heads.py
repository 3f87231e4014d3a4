"""Widen heads with zeros for a target that was padded with zeros: the logits of the small heads at the cost of large ones.

    python benchmarks/pad_heads.py HEADS PADDED_TARGET OUT

A target whose embeddings and last hidden states are those of a smaller model, followed by zeros, has the logits of that model and
the cost of its own width. So do these heads: every weight goes to the leading corner of a larger one. Where a matrix reads
concatenated vectors (Hydra, MTP, EAGLE), the columns of each vector move to its new position. Norms average over the width, so
their weights shrink by sqrt(old / new) and their eps by old / new. The target may be deeper as well: each of its layers is then
followed by layers that add nothing, layer `i` of the source is layer `i * times`, and its output is that of the last added layer
behind it, which is the one that EAGLE-3 and parallel MTP heads read instead. Nothing is written unless the logits are the same.
Such targets are made by `pad_target.py`. Numbers measured with such heads must be labelled "padded".
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad
from transformers import AutoConfig, PreTrainedModel

from headstart.drafters.parts.heads import Heads
from headstart.drafters.parts.losses import Batch
from headstart.formats import TargetInfo, describe, describe_target, load, save
from headstart.speculation.heads_plan import load_plan, save_plan
from headstart.target.embed_head import EmbedHead
from headstart.target.loading import load_model
from headstart.target.tokenizer_loading import load_tokenizer

TOLERANCE = 1e-3  # of logits, relative to the largest


def widen(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`weight` in the leading corner of zeros."""
    result = weight.new_zeros(shape)
    result[tuple(map(slice, weight.shape))] = weight
    return result


def widen_concatenated(weight: Tensor, old: int, shape: tuple[int, ...]) -> Tensor:
    """A matrix that reads `count` concatenated vectors, [rows, count * old], widened to `shape`, [more rows, count * more]."""
    blocks = weight.unflatten(1, (-1, old))
    return widen(blocks, (shape[0], blocks.shape[1], shape[1] // blocks.shape[1])).flatten(1)


def is_concatenated(name: str, weight: Tensor, like: Tensor, old: int, hidden: int) -> bool:
    """Whether a matrix reads concatenated vectors of the target's width."""
    count = weight.shape[-1] // old
    reads = (
        "fuse" in name
        or "eh_proj" in name
        or name.startswith("fc.")
        or name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    )
    return reads and weight.dim() == 2 and weight.shape[1] == count * old and like.shape[1] == count * hidden


def widened(heads: Heads, hidden: int, layers: int, times: int = 1) -> Heads:
    """The same heads for hidden states of width `hidden`, in float32.

    layers: number of layers of the small target.
    times: how many layers of the padded target there are for each of them.
    Raises ValueError where nothing is larger, or attention heads of the same size do not fill the width.
    """
    if hidden < heads.hidden or (hidden == heads.hidden and times == 1):
        raise ValueError(f"the heads are for a hidden size of {heads.hidden} and the target has {hidden}; nothing to widen")
    config = widened_config(heads.config, heads.hidden, hidden)
    large = type(heads)(deepened_config(config, layers, times), hidden, heads.vocab)
    shrink = math.sqrt(heads.hidden / hidden)
    weights: dict[str, Tensor] = {}
    for name, like in large.state_dict().items():
        weight = heads.state_dict()[name]
        if not weight.is_floating_point():
            weights[name] = weight  # tokens of a vocabulary
        elif is_concatenated(name, weight, like, heads.hidden, hidden):
            weights[name] = widen_concatenated(weight.float(), heads.hidden, tuple(like.shape))
        else:
            weight = weight.float()
            weights[name] = widen(weight * shrink if "norm" in name else weight, tuple(like.shape))
    large.load_state_dict(weights)
    large.calibration = heads.calibration
    return large.eval()


def widened_config(config: Any, old: int, hidden: int) -> Any:
    """The configuration with larger decoder layers: more attention heads of the same size, an MLP in proportion."""
    if getattr(config, "prefix", None) is not None:
        sizes = widened_layer(config.prefix, old, hidden)
        return config.model_copy(update={"prefix": config.prefix.model_copy(update=sizes)})
    if getattr(config, "block", None) is not None:
        layer = AutoConfig.for_model(**config.block)  # settings that are a family's own are not in the folder
        sizes = widened_layer(layer, old, hidden)
        head = {"head_dim": getattr(layer, "head_dim", None) or old // layer.num_attention_heads}
        return config.model_copy(update={"block": {**config.block, **sizes, **head, "hidden_size": hidden}})
    return config


def deepened_config(config: Any, layers: int, times: int) -> Any:
    """The configuration with the layers that are read where the padded target has their output."""
    moved: dict[str, Any] = {}
    if getattr(config, "taps", None):
        moved["taps"] = tuple(moved_tap(tap, layers, times) for tap in config.taps)
    if getattr(config, "tap", None) is not None:
        moved["tap"] = moved_tap(config.tap, layers, times)
    return config.model_copy(update=moved)


def moved_tap(tap: int, layers: int, times: int) -> int:
    """The last added layer behind a tapped one. Negative numbers, which count from the end, stay negative."""
    behind = (tap % layers + 1) * times - 1
    return behind - layers * times if tap < 0 else behind


def widened_layer(layer: Any, old: int, hidden: int) -> dict[str, Any]:
    """The sizes of a wider decoder layer. Raises ValueError where attention heads of the same size do not fill the width."""
    counts = {name: getattr(layer, name) * hidden for name in ("num_attention_heads", "num_key_value_heads")}
    if odd := [name for name, count in counts.items() if count % old]:
        raise ValueError(f"{odd[0]} is {getattr(layer, odd[0])}, which does not grow from {old} to {hidden} in whole heads")
    sizes: dict[str, Any] = {name: count // old for name, count in counts.items()}
    sizes["intermediate_size"] = math.ceil(layer.intermediate_size * hidden / old)
    sizes["rms_norm_eps"] = layer.rms_norm_eps * old / hidden
    return sizes


class NarrowEmbedHead:
    """Embedding and LM head of the small model inside a padded one.

    hidden: width of the small model.
    Raises ValueError for a target that is not padded beyond it.
    """

    parameters = ()  # nothing is trained here

    def __init__(self, embed_head: EmbedHead, hidden: int) -> None:
        self._embed_head, self.hidden, self.vocab = embed_head, hidden, embed_head.vocab
        embedding = embed_head.embed(torch.arange(embed_head.vocab))
        if embedding[:, hidden:].any() or embed_head.lm_head_weight[:, hidden:].any():
            raise ValueError(f"the target is not padded: beyond a width of {hidden}, its embedding or its LM head is not zero")
        self._embedding, self.lm_head_weight = embedding[:, :hidden], embed_head.lm_head_weight[:, :hidden]

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [..., hidden] of tokens [...]."""
        return self._embedding[tokens]

    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., vocab] of last hidden states [..., hidden]."""
        return self.scale_logits(linear(states, self.lm_head_weight))

    def scale_logits(self, logits: Tensor) -> Tensor:
        """As the padded model's."""
        return self._embed_head.scale_logits(logits)


@torch.no_grad()
def gap(small: Heads, large: Heads, length: int = 12) -> float:
    """The largest difference of logits on one random text, relative to the largest logit."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, length, len(small.taps), small.hidden, generator=generator)
    tokens = torch.randint(0, small.vocab, (1, length), generator=generator)
    loss_mask = torch.ones_like(tokens, dtype=torch.bool)
    wide = pad(states, (0, large.hidden - small.hidden))
    texts = [Batch(tokens, loss_mask, taps.flatten(2), taps[:, :, -1]) for taps in (states, wide)]
    pairs = zip(small.states(texts[0]), large.states(texts[1]), strict=True)
    worst = 0.0
    for narrow_output, wide_output in pairs:
        expected, actual = (output.output_head(output.states[0]) for output in (narrow_output, wide_output))
        worst = max(worst, float((expected - actual).abs().max() / expected.abs().max()))
    return worst


def added_layers(layers: int, model: PreTrainedModel) -> int:
    """How many layers of a padded target there are for each layer of the small one, which has `layers`.

    Raises ValueError where their number is no multiple, and where a layer that should be an added one adds something.
    """
    count = int(model.config.num_hidden_layers)
    if count % layers:
        raise ValueError(f"the heads are for a target of {layers} layers, and the padded one has {count}, which is no multiple")
    for number, layer in enumerate(model.get_decoder().layers):
        outputs = [module.weight for name, module in layer.named_modules() if name.endswith(("o_proj", "down_proj"))]
        if number % (count // layers) and any(weight.any() for weight in outputs):
            raise ValueError(
                f"layer {number} adds something; in a deeper target, layers are added behind each layer of the small one"
            )
    return count // layers


def check_target(heads: TargetInfo, target: TargetInfo) -> None:
    """Raise ValueError where the padded target is not the target of the heads, padded."""
    for name in ("vocab", "tokenizer"):
        expected, actual = getattr(heads, name), getattr(target, name)
        if None not in (expected, actual) and expected != actual:
            raise ValueError(f"the heads are for {heads.name} with {name} {expected}, but {target.name} has {actual}")


def pad_heads(source: Path, target: Path, out: Path) -> float:
    """Write widened heads with the calibration of the small ones. Returns the relative difference of their logits, in float32.

    Raises ValueError, before anything is written, where the target is not their target padded, or the logits differ.
    """
    described, small = describe(source), load(source).float()
    model = load_model(target, dtype="float32", device="cpu")
    target_info = describe_target(model, load_tokenizer(target))
    check_target(described.target, target_info)
    embed_head = EmbedHead(model)
    layers = described.target.layers
    large = widened(small, embed_head.hidden, layers, added_layers(layers, model)).bind(embed_head)
    worst = gap(small.bind(NarrowEmbedHead(embed_head, small.hidden)), large)
    if not worst <= TOLERANCE:
        raise ValueError(f"widening changed the heads: their logits differ by {worst:.1e} of the largest")
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
