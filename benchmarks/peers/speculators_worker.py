"""Runs in the environment of speculators: validates and loads FOLDER/export, and drafts from FOLDER/given.safetensors.

    python speculators_worker.py FOLDER

Writes the drafts to FOLDER/theirs.safetensors, and prints one JSON object.
"""

import json
import sys
import warnings
from pathlib import Path

import speculators
import torch
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel, SpeculatorModelConfig


def main(folder: Path) -> None:
    """Validate, load, draft."""
    export = folder / "export"
    config = SpeculatorModelConfig.from_pretrained(export)  # pydantic: every field is validated
    config.transformer_layer_config._attn_implementation = "eager"
    with warnings.catch_warnings(record=True) as warned:
        model = SpeculatorModel.from_pretrained(export, config=config, dtype=torch.float32).eval()
    written, loaded = load_file(export / "model.safetensors"), model.state_dict()
    different = [name for name, tensor in written.items() if name not in loaded or not torch.equal(loaded[name], tensor)]
    missing = sorted(name for name in loaded if name not in written and not name.startswith("verifier_"))
    given = load_file(folder / "given.safetensors")
    save_file({"drafts": drafted(model, given)}, folder / "theirs.safetensors")
    said = {"version": speculators.__version__, "config": type(config).__name__, "model": type(model).__name__}
    said |= {"tensors": len(written), "different_tensors": different, "not_in_the_export": missing}
    print(json.dumps(said | {"warnings": [str(warning.message)[:200] for warning in warned]}))


def drafted(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """[steps, positions] tokens of the target."""
    tokens = given["tokens"][None]
    with torch.no_grad():
        drafts = model.forward(given["features"][None], tokens, torch.zeros_like(tokens), ttt_steps=len(given["drafts"]))
    stacked = torch.cat(drafts)
    return stacked if model.d2t is None else stacked + model.d2t[stacked]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
