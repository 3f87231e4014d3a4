"""GGUF files with the weights of a Hugging Face Llama folder, for llama.cpp.

    python benchmarks/peers/gguf_files.py FOLDER... [--dtypes bf16 f32 q8_0] [--gguf-py PATH]

Writes FOLDER-DTYPE.gguf beside every FOLDER. The files hold no tokenizer: llama-bench feeds token ids. Needs the `gguf` package, or
the gguf-py of the llama.cpp sources.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = {"bf16": "BF16", "f32": "F32", "q8_0": "Q8_0"}  # our names to those of the `gguf` package
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of a Hugging Face Llama. Raises ValueError for a tensor that a Llama does not have."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    parts = name.split(".")
    module = ".".join(parts[3:-1])
    if parts[:2] != ["model", "layers"] or module not in INSIDE or parts[-1] != "weight":
        raise ValueError(f"{name} is no tensor of a Llama without biases; only such models can be written")
    return f"blk.{parts[2]}.{INSIDE[module]}.weight"


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """A query or key projection [heads * head_dim, hidden] with its rows in llama.cpp's order.

    The rotary embedding of transformers turns channel i of a head together with channel i + head_dim / 2, and llama.cpp's turns
    neighbours: channels 0, head_dim / 2, 1, head_dim / 2 + 1 and so on become 0, 1, 2, 3.
    """
    halves = weight.unflatten(0, (heads, 2, -1))  # [heads, 2, head_dim / 2, hidden]
    return halves.transpose(1, 2).flatten(0, 2)


def check_config(config: dict[str, Any]) -> None:
    """Raise ValueError for a configuration that needs more than is written here."""
    rope = config.get("rope_parameters") or {}
    faults = {
        "model_type": config["model_type"] != "llama",
        "rope_parameters": rope.get("rope_type", "default") != "default" or config.get("rope_scaling") is not None,
        "attention_bias": bool(config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
    }
    if odd := [name for name, is_odd in faults.items() if is_odd]:
        raise ValueError(f"{odd[0]} is {config.get(odd[0])}; only plain Llama models can be written as GGUF files here")


def metadata(config: dict[str, Any]) -> dict[str, int | float]:
    """The numbers that llama.cpp reads, by the name of the `GGUFWriter` method that adds each."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    return {
        "add_vocab_size": config["vocab_size"],
        "add_context_length": config["max_position_embeddings"],
        "add_embedding_length": config["hidden_size"],
        "add_block_count": config["num_hidden_layers"],
        "add_feed_forward_length": config["intermediate_size"],
        "add_head_count": heads,
        "add_head_count_kv": config.get("num_key_value_heads") or heads,
        "add_key_length": head_dim,
        "add_value_length": head_dim,
        "add_rope_dimension_count": head_dim,
        "add_layer_norm_rms_eps": config["rms_norm_eps"],
        "add_rope_freq_base": rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
    }


def tensors(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor with llama.cpp's name and order of rows, in float32."""
    heads = {"q_proj": config["num_attention_heads"]}
    heads["k_proj"] = config.get("num_key_value_heads") or heads["q_proj"]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors file; save the model with save_pretrained")
    for file in files:
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118, it is no dictionary
                weight = stored.get_tensor(name).float()
                projection = name.split(".")[-2]
                yield gguf_name(name), interleaved(weight, heads[projection]) if projection in heads else weight


def import_gguf(gguf_py: Path | None = None) -> Any:
    """The `gguf` package. gguf_py: a folder that holds it, such as llama.cpp's gguf-py; None: it is installed.

    Raises ValueError where there is none.
    """
    if gguf_py is not None and str(gguf_py) not in sys.path:
        sys.path.insert(0, str(gguf_py))
    try:
        import gguf
    except ImportError:
        raise ValueError("the package gguf is missing; install it with pip, or give --gguf-py with llama.cpp's gguf-py") from None
    return gguf


def write_gguf(folder: Path, out: Path, dtype: str, gguf_py: Path | None = None) -> None:
    """Write a file with all matrices in a dtype of `DTYPES`, and the norms in float32. Raises ValueError for other models."""
    gguf = import_gguf(gguf_py)
    config = json.loads((folder / "config.json").read_text())
    check_config(config)
    kind = gguf.GGMLQuantizationType[DTYPES[dtype]]
    file_type = gguf.LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{DTYPES[dtype]}"]
    unfinished = out.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("no_vocab")
    for method, number in metadata(config).items():
        getattr(writer, method)(number)
    with torch.no_grad():
        for name, weight in tensors(folder, config):
            own = kind if weight.dim() == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quants.quantize(weight.contiguous().numpy(), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(out)


def gguf_path(folder: Path, dtype: str) -> Path:
    """Where the file of a folder is: beside it."""
    return folder.parent / f"{folder.name}-{dtype}.gguf"


def ensure_gguf(folder: Path, dtype: str, gguf_py: Path | None = None) -> Path:
    """The file of a folder, written if it is missing or older than the folder's weights."""
    out = gguf_path(folder, dtype)
    newest = max((file.stat().st_mtime for file in folder.glob("*.safetensors")), default=0.0)
    if not out.exists() or out.stat().st_mtime < newest:
        write_gguf(folder, out, dtype, gguf_py)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--gguf-py", type=Path)
    arguments = parser.parse_args()
    for folder in arguments.folders:
        for dtype in arguments.dtypes:
            try:
                print(ensure_gguf(folder, dtype, arguments.gguf_py))
            except ValueError as error:
                parser.error(str(error))


if __name__ == "__main__":
    main()
