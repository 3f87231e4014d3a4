"""Times answers of the engine and of `model.generate`, a round at a time, for `headline.py`, which runs this as a process.

    python benchmarks/peers/answers.py TARGET --drafters HEADS HEADS@best:nodes=5 --temperature 0.7

Every answer ends where plain decoding's ends or begins to repeat itself (`headstart.bench.loops`), so that no loop flatters a
drafter; all runs give the same number of tokens for a prompt. Times begin at the first token, so a prompt is not in them. It greets
with the lengths of prompts and answers, and says for every round the seconds of all answers, summed, by run.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.utils import logging
from worker import serve

import headstart
from headstart.bench import report, runner
from headstart.bench.loops import first_loop
from headstart.bench.tasks import encode_prompt_sets, read_prompt_sets
from headstart.engine.stats import Stats
from headstart.speculation.params import SamplingParams
from headstart.target.loading import load_model

GENERATE = "generate"
LEAST = 8  # tokens; shorter answers are left out


class Stamp(LogitsProcessor):
    """Changes nothing and notes when the first token's logits are there."""

    first: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.first = self.first or time.perf_counter()
        return scores


def cut_setups(setup: runner.Setup, plain: runner.Run) -> list[runner.Setup]:
    """A setup per task whose answer ends where plain decoding's does or begins to repeat itself; short ones are left out."""
    setups = []
    for index, task in enumerate(setup.tasks):
        one = replace(setup, tasks=(task,), params=replace(setup.params, seed=index))
        length = first_loop(runner.answer(one, plain, 0).tokens)
        if length >= LEAST:
            setups.append(replace(one, params=replace(one.params, max_tokens=length, ignore_eos=True)))
    if not setups:
        raise ValueError(f"every answer ends or repeats itself within {LEAST} tokens; give other prompts")
    return setups


def generate(model: PreTrainedModel, setup: runner.Setup) -> tuple[float, Stats]:
    """Seconds after the first token of one answer by transformers."""
    task, params, stamp = setup.tasks[0], setup.params_of(0), Stamp()
    config = GenerationConfig(
        max_new_tokens=params.max_tokens,
        do_sample=params.temperature > 0,
        temperature=params.temperature or None,
        top_k=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    ids = torch.tensor([task.prompt])
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, logits_processor=[stamp])
    assert stamp.first is not None
    return time.perf_counter() - stamp.first, Stats()


def decode(run: runner.Run, setup: runner.Setup) -> tuple[float, Stats]:
    """Seconds after the first token of one answer by the engine, and its statistics."""
    sample = runner.answer(setup, run, 0)
    assert len(sample.tokens) == setup.params.max_tokens, "an answer is shorter than plain decoding's"
    return sample.seconds - sample.prompt_seconds, sample.stats


Answer = Callable[[runner.Setup], tuple[float, Stats]]


def one_round(runs: dict[str, Answer], setups: Sequence[runner.Setup]) -> dict[str, Any]:
    """Seconds of all answers by run, and tau of the runs that draft; interleaved prompt by prompt."""
    seconds = dict.fromkeys(runs, 0.0)
    stats: dict[str, list[Stats]] = {name: [] for name in runs}
    for setup in setups:
        for name, answer in runs.items():
            spent, part = answer(setup)
            seconds[name] += spent
            stats[name].append(part)
    return {"seconds": seconds, "tau": {name: Stats.total(parts).tau for name, parts in stats.items() if name != GENERATE}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--drafters", nargs="*", default=[], help="HEADS[@PLANNER]; plain decoding and generate always run")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prompts", nargs="+", default=["stories", "questions"])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    llm = headstart.load(arguments.target, device="cpu", dtype=arguments.dtype, drafter=None, max_rows=1)
    model = load_model(arguments.target, arguments.dtype, "cpu")
    params = SamplingParams(max_tokens=arguments.max_tokens, temperature=arguments.temperature)
    tasks, _ = encode_prompt_sets(llm, read_prompt_sets(arguments.prompts, arguments.limit), params.max_tokens)
    setup = runner.Setup(llm.engine.target, tasks, params, llm.stop_ids)
    prepared = runner.prepare(setup, arguments.drafters)
    setups = cut_setups(setup, prepared[0])
    runs: dict[str, Answer] = {GENERATE: lambda one: generate(model, one)}
    runs |= {run.name: lambda one, run=run: decode(run, one) for run in prepared}  # type: ignore[misc]
    one_round(runs, setups[:1])  # warm-up
    greeting = {
        "prompt": [len(one.tasks[0].prompt) for one in setups],
        "answer": [one.params.max_tokens for one in setups],
        "labels": report.labels(setup),
    }
    serve(greeting, lambda: one_round(runs, setups))


if __name__ == "__main__":
    main()
