"""A larger model that says what a smaller one says: more layers, wider MLPs, the same hidden size.

python -m recipes.embedded.grow --model FOLDER --config recipes/embedded/target/config.json --out WORK/grown

What training has been paid for is not lost (Net2Net, Chen et al. 2016): a new layer adds nothing to the residual stream at first,
for its two output matrices are zero, and neither do the new columns of an MLP.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")  # what a layer adds to the stream


def places(few: int, many: int) -> list[int]:
    """Where in the larger model each layer of the smaller one stands: new layers are spread evenly between them."""
    return [(many * layer) // few for layer in range(few)]


@torch.no_grad()
def grow(small: LlamaForCausalLM, large: LlamaForCausalLM) -> LlamaForCausalLM:
    """Fill `large`, which has random weights, in place. Raises ValueError where its embeddings are of another size."""
    if small.model.embed_tokens.weight.shape != large.model.embed_tokens.weight.shape:
        raise ValueError("only layers and MLPs can grow; let the vocabulary and the hidden size be the same")
    for layer in large.model.layers:
        for name in OUTPUTS:
            layer.get_parameter(name).zero_()
    for place, layer in zip(places(len(small.model.layers), len(large.model.layers)), small.model.layers, strict=True):
        for name, weight in layer.named_parameters():
            corner = tuple(slice(size) for size in weight.shape)
            large.model.layers[place].get_parameter(name)[corner] = weight
    large.model.embed_tokens.weight.copy_(small.model.embed_tokens.weight)
    large.model.norm.weight.copy_(small.model.norm.weight)
    return large


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the smaller model")
    parser.add_argument("--config", type=Path, required=True, help="config.json of the larger one")
    parser.add_argument("--out", type=Path, required=True, help="folder for it")
    args = parser.parse_args()
    torch.manual_seed(0)
    small = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    large = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.config), dtype=torch.float32)
    large.generation_config = small.generation_config
    grow(small, large).save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)


if __name__ == "__main__":
    main()
