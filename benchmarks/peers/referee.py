"""Exported heads in vLLM and here: in every round both engines must keep the same number of drafts.

    python benchmarks/peers/referee.py WORK [--model FOLDER] HEADS... [--plugin HEADS...] [--prompts questions] [--limit 8]

In fp32 at temperature 0, one request at a time, on the CPU. vLLM is installed as `vllm_cpu.py` does, in an environment of its
own in WORK, with the plug-in of `integrations/vllm`, which drafts with the heads after --plugin as they are. EAGLE-3 heads are
exported in vLLM's own layout and in that of speculators. vLLM's plain decoding and its prompt lookup are compared by text only.
The exit code is 1 where anything differs.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import vllm_cpu
from vllm_cpu import Deadline

from headstart.bench.conformance import ours
from headstart.bench.conformance.rounds import Comparison, compare
from headstart.bench.conformance.verify import against_vllm, verify, vllm_answers
from headstart.formats import describe
from headstart.formats.exporting import export_heads

PLUGIN = Path(__file__).parents[2] / "integrations" / "vllm"
ENGINES = {"eagle3": ("vllm", "speculators")}  # layouts of a method that vLLM reads, if not its own alone


def ensure_plugin(python: Path, deadline: Deadline, log: Path) -> None:
    """Install the plug-in as it is in this checkout. Raises ValueError where that fails."""
    command = [str(python), "-m", "pip", "--quiet", "install", "--no-deps", "--force-reinstall", str(PLUGIN)]
    deadline.run(command, "installing the plug-in", log)


def exported(heads: Path, plan: ours.Plan, work: Path, python: Path) -> Iterator[tuple[str, Comparison]]:
    """The comparisons of heads in each layout that vLLM reads. Raises ValueError where an export is not as its manifest says."""
    method = describe(heads).method
    for engine in ENGINES.get(method, ("vllm",)):
        out = work / "exports" / f"{heads.absolute().parent.name}-{heads.name}-{engine}"
        export_heads(heads, plan.model, engine, out)
        found = verify(out, plan, str(python))
        if found.errors or found.comparison is None:
            raise ValueError(f"{out}: {'; '.join((*found.errors, *found.notes))}")
        yield f"{heads.name} ({method}), {engine} layout", found.comparison


def plugged_in(heads: Path, plan: ours.Plan, python: Path) -> Comparison:
    """The comparison of heads with which the plug-in drafts."""
    config = {"model": "headstart_vllm.Proposer", "num_speculative_tokens": plan.drafts}
    return against_vllm(plan, heads, config, str(python), {"additional_config": {"headstart_heads": str(heads.absolute())}})


def texts(plan: ours.Plan, python: Path) -> Iterator[tuple[str, Comparison]]:
    """The comparisons of plain decoding here with vLLM's plain decoding and its prompt lookup."""
    prompts, plain = ours.decode(plan, None)
    for name in (None, "lookup"):
        config = vllm_cpu.speculation(name)
        yield f"vLLM's {name or 'plain decoding'}", compare(plain, vllm_answers(plan, prompts, config, str(python)), 0)


def judge(arguments: argparse.Namespace) -> Iterator[tuple[str, Comparison]]:
    """All comparisons by name, as they end; those by text only have no acceptance."""
    deadline = Deadline(arguments.minutes)
    python = vllm_cpu.ensure_installed(arguments.work, deadline)
    if arguments.plugin:
        ensure_plugin(python, deadline, arguments.work / "install.log")
    prompts = tuple(arguments.prompts) or ("questions", "stories")
    plan = ours.Plan(arguments.model, prompts, arguments.limit, arguments.max_tokens, arguments.drafts)
    yield from texts(plan, python)
    for heads in arguments.heads:
        yield from exported(heads, plan, arguments.work, python)
    for heads in arguments.plugin:
        yield f"{heads.name} ({describe(heads).method}), plug-in", plugged_in(heads, plan, python)


def line(name: str, one: Comparison) -> str:
    """A line of the table."""
    is_text = not one.acceptance[0]
    rounds = "by text only" if is_text else f"{one.equal_rounds}/{one.rounds}"
    shares = " | ".join(" ".join(f"{share:.3f}" for share in shares) for shares in one.acceptance)
    return f"{name:40} {one.equal_texts:>3}/{one.texts:<3} {rounds:>13}   {'' if is_text else shares}"


def is_right(one: Comparison) -> bool:
    """Whether nothing differs; without acceptance only texts are compared."""
    return one.is_equal if one.acceptance[0] else one.equal_texts == one.texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("heads", type=Path, nargs="*", help="folders of heads to export: eagle, eagle3, medusa")
    parser.add_argument(
        "--model", help="with heads of 64 or 128 channels, which vLLM's CPU kernels read; default: the embedded model"
    )
    parser.add_argument("--plugin", type=Path, nargs="*", default=[], help="folders of medusa or hydra heads for the plug-in")
    parser.add_argument("--prompts", action="append", default=[], help="as for `headstart bench`; default: questions and stories")
    parser.add_argument("--limit", type=int, default=8, help="prompts of each set")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=30, help="for the installation")
    arguments = parser.parse_intermixed_args()
    arguments.work = arguments.work.absolute()

    import torch

    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {}
    print(f"{'':40} {'texts':^7} {'equal rounds':>13}   kept by position: headstart | vLLM")
    try:
        for name, one in judge(arguments):
            print(line(name, one), flush=True)
            results[name] = asdict(one) | {"is_right": is_right(one)}
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps({"package": f"{vllm_cpu.PACKAGE} {vllm_cpu.VERSION}", "results": results}))
    sys.exit(not all(result["is_right"] for result in results.values()))


if __name__ == "__main__":
    main()
