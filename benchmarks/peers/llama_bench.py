"""Runs llama-bench and reads what it says. Holds no model and no torch.

What its figures are, read in llama.cpp's sources: `-d D` fills the KV cache with D tokens before the clock starts. `-n N` then
feeds N single tokens one after another and waits for each, so a pass takes the time divided by N, behind D to D + N - 1 tokens.
`-p P` feeds P tokens in one batch, one pass, of which only the last has logits; with `-embd 1` all P go through the LM head, as the
nodes of a tree do. It draws tokens at random and samples nothing. `samples_ns` holds the time of every repetition.
"""

import json
import os
import resource
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

DECODED = 32  # single tokens per sample of a plain pass
BIN = Path("build", "bin")  # inside llama.cpp's sources


@dataclass(frozen=True, order=True)
class Pass:
    """What llama-bench timed.

    nodes: tokens of the pass.
    flash: whether flash attention was on.
    all_logits: whether all tokens have logits, not only the last.
    repack: whether weights were reordered for this processor's kernels where there are such.
    """

    nodes: int
    flash: bool
    all_logits: bool
    repack: bool = True


@dataclass(frozen=True)
class Bench:
    """How to run llama-bench.

    program: its path.
    threads: of its own.
    pages: "huge": weights are read into memory that may have 2 MiB pages; "default": they are mapped from the file.
    context: tokens in the KV cache before a pass.
    """

    program: Path
    threads: int
    pages: str = "huge"
    context: int = 256

    def command(self, gguf: Path, nodes: Sequence[int], repetitions: int, all_logits: bool, repack: bool = True) -> list[str]:
        """The command for passes of these numbers of tokens, with flash attention off and on."""
        several = [str(n) for n in nodes if n > 1]
        words = [str(self.program), "-m", str(gguf), "-t", str(self.threads), "-d", str(self.context), "-fa", "0,1"]
        words += ["-r", str(repetitions), "-o", "json", "-embd", str(int(all_logits)), "--repack", str(int(repack))]
        words += ["-n", str(DECODED if 1 in nodes else 0), "-p", ",".join(several) or "0"]
        return words + (["-lm", "none"] if self.pages == "huge" else [])

    def environment(self) -> dict[str, str]:
        """The environment; glibc's allocator asks for huge pages only where it is told to."""
        own = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if self.pages == "huge" else {}
        return {**os.environ, **own}

    def run(self, gguf: Path, nodes: Sequence[int], repetitions: int = 3) -> dict[Pass, list[float]]:
        """Milliseconds of every repetition of every pass.

        Weights that are reordered for AMX make llama-bench die on a virtual machine that names AMX and does not have it; then they
        are left as they are. Raises ValueError, with llama-bench's last line, where it fails all the same.
        """
        times: dict[Pass, list[float]] = {}
        for all_logits in (False, True):
            wanted = [n for n in nodes if n > 1 or not all_logits]  # a single token has its logits anyway
            if wanted:
                first, second = (self.command(gguf, wanted, repetitions, all_logits, repack) for repack in (True, False))
                times |= read(self._output(first, second))
        return times

    def _output(self, command: Sequence[str], second: Sequence[str] | None = None) -> str:
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=900)
        if done.returncode == -signal.SIGILL and second:
            return self._output(second)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ValueError(f"llama-bench ended with exit status {done.returncode}: {last}")
        return done.stdout


def read(output: str) -> dict[Pass, list[float]]:
    """Milliseconds per pass of every repetition, from llama-bench's JSON. Raises ValueError for a test of another kind."""
    times: dict[Pass, list[float]] = {}
    for test in json.loads(output):
        num_passes, nodes = (test["n_gen"], 1) if test["n_gen"] else (1, test["n_prompt"])
        if not nodes or (test["n_gen"] and test["n_prompt"]) or nodes > min(test["n_batch"], test["n_ubatch"]):
            raise ValueError(f"a test of {test['n_prompt']} and {test['n_gen']} tokens is not one kind of pass; give -p or -n")
        key = Pass(nodes, bool(test["flash_attn"]), bool(test["embeddings"]) or nodes == 1, bool(test["repack"]))
        times.setdefault(key, []).extend(ns / 1e6 / num_passes for ns in test["samples_ns"])
    return times


def best(times: Mapping[Pass, Sequence[float]], nodes: int, all_logits: bool) -> tuple[Pass, float, float]:
    """The faster setting of flash attention for a pass: which, its median and its least, in milliseconds.

    Raises ValueError where that pass was not timed.
    """
    wanted = [key for key in times if key.nodes == nodes and key.all_logits is (all_logits or nodes == 1)]
    if not wanted:
        raise ValueError(f"passes of {nodes} tokens were not timed; the timed ones have {sorted({key.nodes for key in times})}")
    chosen = min(wanted, key=lambda key: median(times[key]))
    return chosen, median(times[chosen]), min(times[chosen])


class Others:
    """How busy other processes keep the machine: `with Others() as others: ...`, then `others.cores`.

    cores: processors that other processes and other machines on the same hardware used on average; None where the system does not
    count it. A figure with more than a tenth of one was disturbed.
    """

    cores: float | None = None

    def __enter__(self) -> "Others":
        self._before = _cpu_seconds()
        return self

    def __exit__(self, *_: Any) -> None:
        after = _cpu_seconds()
        if self._before is None or after is None:
            return
        elapsed, busy, own = (new - old for new, old in zip(after, self._before, strict=True))
        self.cores = max(0.0, busy - own) / elapsed if elapsed else None


def _cpu_seconds() -> tuple[float, float, float] | None:
    """Seconds since the machine started, processor time of all processes, and of this one with its ended children; Linux only."""
    stat, uptime = Path("/proc/stat"), Path("/proc/uptime")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    ticks = os.sysconf("SC_CLK_TCK")
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    return float(uptime.read_text().split()[0]), (user + nice + system + irq + softirq + steal) / ticks, own


def merged(rounds: Sequence[Mapping[Any, Sequence[float]]]) -> dict[Any, list[float]]:
    """The samples of all rounds, by pass."""
    pairs = sorted(((key, list(times)) for one in rounds for key, times in one.items()), key=lambda pair: pair[0])
    return {key: [time for _, times in group for time in times] for key, group in groupby(pairs, key=lambda pair: pair[0])}
