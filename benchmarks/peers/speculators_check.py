"""Exports in the format of speculators, judged by the library itself: its validator, its loader, and what it computes with them.

    python benchmarks/peers/speculators_check.py WORK [--heads eagle3] [--model FOLDER] [--minutes 15]

Installs speculators into an environment of its own in WORK, and uses it as it is where it is there. The heads are exported in
float32; the library validates the configuration, loads the folder with the target's embedding, and drafts at every position of a
text from the same hidden states as ours. The tokens must be equal, and every tensor that it loaded the one that was written.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PACKAGE, VERSION = "speculators", "0.9.0"
UNWANTED = ("torchvision", "torchcodec", "torchaudio")  # built for CUDA, they prevent transformers from being imported
LENGTH = 64  # tokens of the text
WORKER = Path(__file__).with_name("speculators_worker.py")


def ensure_installed(work: Path, minutes: float) -> Path:
    """The Python of an environment that has the library. Raises ValueError where it cannot be installed."""
    folder = work / f"{PACKAGE}-{VERSION}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.is_file():
        work.mkdir(parents=True, exist_ok=True)
        pip = [python, "-m", "pip", "--quiet"]
        install, uninstall = [*pip, "install", f"{PACKAGE}=={VERSION}"], [*pip, "uninstall", "--yes", *UNWANTED]
        for command in ([sys.executable, "-m", "venv", folder], install, uninstall):
            try:
                subprocess.run(list(map(str, command)), check=True, timeout=60 * minutes)
            except (subprocess.SubprocessError, OSError) as error:
                raise ValueError(f"{PACKAGE} {VERSION} cannot be installed in {folder}: {error}") from None
        ready.touch()
    return python


def our_drafts(heads_folder: Path, model_folder: str) -> tuple[dict[str, torch.Tensor], int]:
    """A text, the features that the heads read, and the tokens they draft at every position; and how deep.

    Tokens [length - 1], features [length - 1, taps * hidden], drafts [steps, length - 1].
    """
    from headstart import formats
    from headstart.drafters.parts.losses import Batch
    from headstart.target.embed_head import EmbedHead
    from headstart.target.hidden_states import forward_with_hidden_states
    from headstart.target.loading import load_model

    model = load_model(model_folder, torch.float32, "cpu")
    heads = formats.load(heads_folder, formats.describe_target(model)).float().bind(EmbedHead(model))
    torch.manual_seed(0)
    tokens = model.generate(torch.tensor([[5, 6, 7]]), max_length=LENGTH, do_sample=True, eos_token_id=-1)
    taps = list(heads.taps)
    with torch.no_grad():
        _, states = forward_with_hidden_states(model, taps, input_ids=tokens, use_cache=False)
        features = torch.cat([states[tap] for tap in taps], -1)
        batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), features, features[..., : heads.hidden])
        drafts = [output.output_head(output.states).argmax(-1)[0, :-1] for output in heads.states(batch)]
    return {"tokens": tokens[0, 1:], "features": features[0, :-1].contiguous(), "drafts": torch.stack(drafts)}, len(drafts)


def check(heads: Path, model: str, python: Path) -> dict[str, Any]:
    """What the library says of an export of these heads, and how many of its drafts are ours."""
    from headstart.formats.exporting import export_heads

    with tempfile.TemporaryDirectory() as folder:
        export_heads(heads, model, "speculators", f"{folder}/export", "float32")
        given, steps = our_drafts(heads, model)
        save_file(given, f"{folder}/given.safetensors")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run([python, WORKER, folder], stdout=subprocess.PIPE, text=True, check=True, env=environment)
        found = json.loads(done.stdout.splitlines()[-1])
        theirs = load_file(f"{folder}/theirs.safetensors")["drafts"]
    pairs = [(theirs[step, : LENGTH - 1 - step], given["drafts"][step, : LENGTH - 1 - step]) for step in range(steps)]
    equal = sum(int((one == other).sum()) for one, other in pairs)
    return {**found, "drafts": sum(len(one) for one, _ in pairs), "equal_drafts": equal}


def main() -> None:
    """Check, and print one JSON object; the exit code is 1 where a draft or a tensor differs."""
    from headstart.target.loading import embedded

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--heads", type=Path, default=embedded("eagle3"))
    parser.add_argument("--model", default=str(embedded("target")))
    parser.add_argument("--minutes", type=float, default=15.0)
    arguments = parser.parse_args()
    found = check(arguments.heads, arguments.model, ensure_installed(arguments.work, arguments.minutes))
    print(json.dumps(found))
    sys.exit(found["equal_drafts"] != found["drafts"] or bool(found["different_tensors"]))


if __name__ == "__main__":
    main()
