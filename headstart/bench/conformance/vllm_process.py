"""vLLM as another engine: a process of the Python that has it, which decodes prompts and says what every round emitted.

Must not import vLLM, transformers or torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("vllm_worker.py")
# One process, so that nothing outlives it, and no network. The cache is small: one request runs at a time.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Job:
    """What vLLM decodes, greedily and one request at a time.

    model: folder of the target.
    prompts: token ids of each.
    max_tokens: of each answer; nothing ends it before.
    speculation: vLLM's `speculative_config`; None: plain decoding.
    dtype: of weights and KV cache, as vLLM calls it.
    repeat: how often each prompt is answered.
    threads: of the process.
    settings: further arguments of `vllm.LLM`.
    """

    model: str
    prompts: Sequence[Sequence[int]]
    max_tokens: int
    speculation: Mapping[str, Any] | None = None
    dtype: str = "float32"
    repeat: int = 1
    threads: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)


def version(python: str = sys.executable) -> str | None:
    """The version of vLLM that a Python has; None where it has none. Raises ValueError where there is no such Python."""
    found: str | None = _run(python, None, timeout=60, log=None)["version"]
    return found


def answers(python: str, job: Job, timeout: float | None = None, log: Path | None = None) -> list[dict[str, Any]]:
    """vLLM's answers: per prompt `tokens`, `rounds` (how many tokens each round emitted) and `seconds` (of each repetition).

    python: the Python that has vLLM.
    timeout: seconds after which it is ended; None: no limit.
    log: a file that gets its errors besides; None: none.
    Raises ValueError where it fails, with its last words.
    """
    result = _run(python, asdict(job), timeout, log, OMP_NUM_THREADS=str(job.threads))
    if result["answers"] is None:
        raise ValueError(f"{python} has no vLLM; install it there, or name the Python that has it")
    found: list[dict[str, Any]] = result["answers"]
    return found


def _run(python: str, job: Mapping[str, Any] | None, timeout: float | None, log: Path | None, **environment: str) -> dict[str, Any]:
    """The worker's last line. job: None: only the version is asked for."""
    settings = {**os.environ, **SETTINGS, **environment}
    settings.pop("PYTHONPATH", None)  # its packages are its own
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        try:
            done = subprocess.run(
                [python, str(WORKER)],
                input=json.dumps(job),
                stdout=subprocess.PIPE,
                stderr=errors,
                timeout=timeout,
                text=True,
                env=settings,
                check=False,
            )
        except (FileNotFoundError, PermissionError) as error:
            raise ValueError(f"vLLM cannot be run: {python}: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise ValueError(f"vLLM did not end within {timeout:g} seconds") from None
        errors.seek(0)
        said = errors.read()
    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            file.write(said)
    if done.returncode:
        where = f"see {log}" if log else f"all it said is in {_kept(said)}"
        raise ValueError(f"vLLM ended with exit status {done.returncode}: {_last_words(said)}; {where}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _kept(said: str) -> str:
    """The name of a file that holds an output from now on."""
    with tempfile.NamedTemporaryFile("w", prefix="headstart-vllm-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.write(said)
    return file.name


def _last_words(said: str) -> str:
    """The first error that a Python names in its output, since later ones follow from it; else its last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [line for line in lines if line.partition(":")[0].rpartition(".")[2].endswith(("Error", "Exception"))]
    return (named or lines[-1:] or ["it said nothing"])[0][:300]
