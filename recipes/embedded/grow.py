"""Growing a model: a larger one with the same logits, with more layers and wider MLPs and the same hidden size.

python -m recipes.embedded.grow --model FOLDER --config recipes/embedded/target/config.json --out WORK/grown

The training of the smaller model is kept (Net2Net, Chen et al. 2016, arXiv 1511.05641): a new layer adds nothing to the residual
stream at first, because its two output matrices are zero, and neither do the new columns of an MLP.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")  # matrices that write to the residual stream


def layer_indices(num_small: int, num_large: int) -> list[int]:
    """Index in the larger model of each layer of the smaller one; new layers are spread evenly between them."""
    return [(num_large * layer) // num_small for layer in range(num_small)]


@torch.no_grad()
def grow(small: LlamaForCausalLM, large: LlamaForCausalLM) -> LlamaForCausalLM:
    """Copy the weights of `small` into `large`, in place. Raises ValueError if their embeddings differ in size."""
    if small.model.embed_tokens.weight.shape != large.model.embed_tokens.weight.shape:
        raise ValueError("only layers and MLPs can grow; let the vocabulary and the hidden size be the same")
    for layer in large.model.layers:
        for name in OUTPUTS:
            layer.get_parameter(name).zero_()
    for index, layer in zip(layer_indices(len(small.model.layers), len(large.model.layers)), small.model.layers, strict=True):
        for name, weight in layer.named_parameters():
            corner = tuple(slice(size) for size in weight.shape)
            large.model.layers[index].get_parameter(name)[corner] = weight
    large.model.embed_tokens.weight.copy_(small.model.embed_tokens.weight)
    large.model.norm.weight.copy_(small.model.norm.weight)
    return large


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the smaller model")
    parser.add_argument("--config", type=Path, required=True, help="config.json of the larger model")
    parser.add_argument("--out", type=Path, required=True, help="folder for the larger model")
    args = parser.parse_args()
    torch.manual_seed(0)
    small = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    large = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.config), dtype=torch.float32)
    large.generation_config = small.generation_config
    grow(small, large).save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)


if __name__ == "__main__":
    main()
