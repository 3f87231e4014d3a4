"""A process that measures, a round at a time: the side that starts it, and the side that runs in it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_bench import Others


def environment(threads: int, pages: str) -> dict[str, str]:
    """The environment of a process with torch, whose allocator asks for huge pages only where it is told to."""
    own = {"THP_MEM_ALLOC_ENABLE": "1"} if pages == "huge" else {}
    return {**os.environ, "OMP_NUM_THREADS": str(threads), **own}


class Worker:
    """A script beside this one that runs `serve`, in a process of its own.

    script: its name.
    words: its arguments.
    threads, pages: see `environment`.
    Raises ValueError where it ends before it is ready; what it says goes to this process's standard error.

    Attributes:
    greeting: its first line, when it was ready.
    """

    def __init__(self, script: str, words: Sequence[str], threads: int, pages: str) -> None:
        command = [sys.executable, str(Path(__file__).parent / script), *words]
        self._what = " ".join([script, *words[:2]])
        self._process = subprocess.Popen(
            command, env=environment(threads, pages), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.greeting = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"the process of {self._what} ended with exit status {self.close()}; see what it said above")
        return json.loads(line)

    def round(self) -> dict[str, Any]:
        """What the script's function returned, and under `others` the processors that other processes used meanwhile."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        result: dict[str, Any] = self._answer()
        return result

    def close(self) -> int:
        """End the process. Returns its exit status."""
        self._process.communicate()
        return self._process.returncode


def serve(greeting: Any, one_round: Callable[[], dict[str, Any]]) -> None:
    """Say the greeting, then one line of JSON for every line of standard input, until that is closed."""
    print(json.dumps(greeting), flush=True)
    for _ in sys.stdin:
        with Others() as others:
            result = one_round()
        print(json.dumps(result | {"others": others.cores}), flush=True)
