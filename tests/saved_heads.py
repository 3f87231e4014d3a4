"""Native heads in a folder for tests of exports: random weights on a small Llama, exported by the whole command's function."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from headstart import formats
from headstart.drafters.registry import method
from headstart.formats.exporting import export_heads
from headstart.formats.importing import import_heads
from headstart.target.embed_head import EmbedHead
from headstart.target.loading import load_model
from headstart.target.tokenizer_loading import load_tokenizer

HIDDEN, VOCAB, LAYERS = 32, 320, 8
PLAIN = {"fc_norm": False, "norm_output": False}
BIASED = {
    "model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "rms_norm_eps": 1e-5, "attention_bias": True, "mlp_bias": True,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
}  # fmt: skip
NARROW = BIASED | {"hidden_size": 16, "num_attention_heads": 2, "attention_bias": False, "mlp_bias": False}


def save_heads(folder: Path, source: Path, name: str, **settings) -> Path:
    """Save heads of a method for the model in a folder, every weight random, and return their folder."""
    model = load_model(source, torch.float32, "cpu")
    info, kind = formats.describe_target(model, load_tokenizer(source)), method(name)
    config = kind.config_type.model_validate(settings)
    torch.manual_seed(5)
    heads = kind(kind.resolve_config(config, model.config), info.hidden, info.vocab).bind(EmbedHead(model))
    for weight in heads.parameters():
        weight.data = torch.randn_like(weight) * 0.3
    if getattr(heads, "ids", None) is not None:
        heads.ids.copy_(torch.randperm(info.vocab)[: len(heads.ids)].sort().values)
    formats.save(folder, heads, info, {})
    return folder


def config_of(folder: Path) -> dict:
    """An export's `config.json`."""
    return json.loads((folder / "config.json").read_text())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """An export's tensors."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def assert_returns(heads: Path, source: Path, engine: str, folder: Path) -> Path:
    """Export heads, import them, and compare all settings and every bit. Returns the export's folder."""
    out, back = folder / "export", folder / "back"
    export_heads(heads, str(source), engine, out)
    import_heads(str(out), str(source), str(back))
    one, other = formats.load(heads), formats.load(back)
    assert other.config == one.config
    expected, actual = one.state_dict(), other.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype is tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
    return out
