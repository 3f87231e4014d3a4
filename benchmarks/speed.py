"""Throughput of the engine against `model.generate`, and of lookup against transformers' prompt lookup, in one process.

    python benchmarks/speed.py MODEL [--prompts edits --replay] [--dtypes bfloat16 float32] [--max-tokens 64] [--repeat 5]

Measurements are interleaved prompt by prompt. Each number is total tokens over the sum of median times, of the samples that hardly
waited for a processor where there are some. Stop tokens are ignored on both sides, so that all answers have the same length. With
--replay the reference answers replace the tokens (in transformers through a logits processor), so the texts are equal too. The last
table times rounds of 16 nodes: the share of verify, commit and host, without drafting. The last line of the output is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.utils import logging

from headstart.bench import report, runner, suites
from headstart.bench.replay import Replay
from headstart.engine.engine import Engine
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Best
from headstart.speculation.rows import Rows
from headstart.speculation.rules import RULES
from headstart.speculation.tree import ROOT, Drafts, Kept
from headstart.target.cache import Seating
from headstart.target.target import Target, load_model
from headstart.target.tokenizer_loading import load_tokenizer
from headstart.text.tokenizer import encode_prompt

SETTINGS = {"T=0": {}, "T=1, top-p 0.9": {"temperature": 1.0, "top_p": 0.9}}
Answer = Callable[[int], tuple[float, int]]  # index of a task to seconds and number of tokens
SIDES = ("generate", "generate, prompt lookup", "plain", "lookup")


class Forced(LogitsProcessor):
    """A logits processor that leaves one token possible at each position: the reference's."""

    def __init__(self, num_prompt: int, reference: Sequence[int]) -> None:
        self.num_prompt, self.reference = num_prompt, reference

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        index = min(input_ids.shape[1] - self.num_prompt, len(self.reference) - 1)
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.reference[index]] = 0
        return forced


class Fifteen:
    """Drafts five branches of three: trees of sixteen nodes. The middle branch is right to depth two, so that slots move."""

    name, taps, slot_bytes = "fifteen", (), 0
    planner = Best(nodes=15, depth=3, width=5, beam=5)

    def __init__(self, text: Sequence[int]) -> None:
        self._text = text

    def attach(self, target: Target, seating: Seating) -> None:
        self._device, self._vocab = target.device, target.vocab

    def extend(self, kept: Kept) -> None: ...

    def propose(self, rows: Rows) -> Drafts:
        following = self._text[rows.root_positions[0] + 1 :]
        depth = min(3, rows.depths[0])
        tokens = [(following[0] + 7919 * (1 + node)) % self._vocab for node in range(5 * depth)]
        for level in range(min(2, depth)):
            tokens[5 * level + 2] = following[level]
        parents = [ROOT] * 5 + list(range(5 * depth - 5))
        levels = [1 + node // 5 for node in range(5 * depth)]
        return Drafts.of(tokens, parents, [0] * len(tokens), levels, [0.5] * len(tokens), device=self._device)

    def fork(self, source: int, seat: int, length: int) -> None: ...

    def free(self, seat: int) -> None: ...


def tasks_of(arguments: argparse.Namespace) -> tuple[runner.Task, ...]:
    """The prompts that fit the context, as tokens."""
    tokenizer = load_tokenizer(arguments.model)
    tasks = []
    for case in suites.load_cases(arguments.prompts, arguments.limit):
        is_message = tokenizer.chat_template is not None and not case.is_beginning
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": case.prompt}] if is_message else case.prompt)
        reference = tokenizer.encode(case.reference or "", add_special_tokens=False) if arguments.replay else None
        if len(prompt) + arguments.max_tokens <= arguments.context:
            tasks.append(runner.Task(tuple(prompt), None if reference is None else tuple(reference)))
    return tuple(tasks)


def generate(model: PreTrainedModel, setup: runner.Setup, index: int, **more: object) -> tuple[float, int]:
    """Seconds and tokens of one answer by transformers."""
    task, params = setup.tasks[index], setup.params_of(index)
    config = GenerationConfig(
        max_new_tokens=params.max_tokens,
        do_sample=params.temperature > 0,
        temperature=params.temperature or None,
        top_p=params.top_p,
        top_k=0,
        eos_token_id=None,
        pad_token_id=0,
        **more,
    )
    forced = [Forced(len(task.prompt), task.reference)] if task.reference else []
    ids = torch.tensor([task.prompt], device=model.device)
    began = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, logits_processor=forced)
    return time.perf_counter() - began, out.shape[1] - len(task.prompt)


def decode(setup: runner.Setup, run: runner.Run, index: int) -> tuple[float, int]:
    """Seconds and tokens of one answer by the engine."""
    sample = runner.answer(setup, run, index)
    return sample.seconds, len(sample.tokens)


def compare(model: PreTrainedModel, setup: runner.Setup, repeat: int) -> dict[str, dict[str, float]]:
    """tokens/s of every side with the fraction of clean samples, and the acceptance length of lookup."""
    plain, lookup = runner.prepare(setup, ["lookup"])

    sides: dict[str, Answer] = {
        "generate": partial(generate, model, setup),
        "generate, prompt lookup": partial(generate, model, setup, prompt_lookup_num_tokens=10),
        "plain": partial(decode, setup, plain),
        "lookup": partial(decode, setup, lookup),
    }
    times: dict[str, list[list[tuple[float, int, bool]]]] = {name: [[] for _ in setup.tasks] for name in sides}
    for answer in sides.values():
        answer(0)  # warm-up
    for _ in range(repeat):
        for index in range(len(setup.tasks)):
            for name, answer in sides.items():
                waited = runner.waiting_seconds()
                seconds, tokens = answer(index)
                delay = (runner.waiting_seconds() or 0.0) - (waited or 0.0)
                times[name][index].append((seconds, tokens, delay <= runner.CLEAN * seconds))
    return {name: summary(tasks) for name, tasks in times.items()} | {"lookup tau": {"tau": lookup.engine.stats.tau}}


def summary(tasks: list[list[tuple[float, int, bool]]]) -> dict[str, float]:
    """Throughput from samples by task: seconds, tokens, whether it is clean."""
    trusted = [[sample for sample in samples if sample[2]] or samples for samples in tasks]
    tokens = sum(samples[0][1] for samples in trusted)
    seconds = sum(median(sample[0] for sample in samples) for samples in trusted)
    flat = [sample[2] for samples in tasks for sample in samples]
    return {"tokens_per_second": tokens / seconds, "ms_per_token": 1000 * seconds / tokens, "clean": sum(flat) / len(flat)}


def round_of_16(setup: runner.Setup, num_tokens: int = 200) -> dict[str, float]:
    """Milliseconds of each part of a round of 16 nodes, and the share of verify, commit and host."""
    prompt = setup.tasks[0].prompt
    text = torch.randint(0, setup.target.vocab, (num_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    replay = Replay(RULES["coupled"])
    replay.follow(prompt, text)
    params = SamplingParams(**{**vars(setup.params_of(0)), "max_tokens": num_tokens, "ignore_eos": True})
    memory = (len(prompt) + num_tokens + 64) * setup.target.slot_bytes
    engine = Engine(setup.target, Fifteen([*prompt, *text]), max_rows=1, memory=memory, accept=replay.rule)
    engine.add(prompt, params)
    rounds: list[dict[str, float]] = []
    while not engine.scheduler.is_idle:
        before, nodes = engine.stats.copy(), engine.stats.nodes
        engine.step()
        if engine.stats.nodes - nodes == 16:
            rounds.append(engine.stats.since(before).seconds)
    parts = {name: 1000 * median(spent[name] for spent in rounds) for name in rounds[0]}
    ours = parts["verify"] + parts["commit"] + parts["host"]
    return parts | {"share": ours / (ours + parts["score"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", default="stories")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--replay", action="store_true")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--exact", action=argparse.BooleanOptionalAction, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results = []
    for dtype in arguments.dtypes:
        target = Target.load(arguments.model, dtype=dtype, exact="auto" if arguments.exact is None else arguments.exact)
        model = load_model(arguments.model, dtype=dtype)
        arguments.context = target.context
        tasks = tasks_of(arguments)
        for name, settings in SETTINGS.items():
            params = SamplingParams(max_tokens=arguments.max_tokens, seed=0, ignore_eos=True, **settings)
            setup = runner.Setup(target, tasks, params, is_replay=arguments.replay)
            numbers = compare(model, setup, arguments.repeat)
            numbers |= {"labels": report.labels(setup), "round of 16": round_of_16(setup)}
            results.append({"dtype": dtype, "sampling": name, **numbers})
    show(results, arguments)
    print(json.dumps({"machine": report.machine(target), "arguments": vars(arguments), "results": results}))


def show(results: Sequence[dict], arguments: argparse.Namespace) -> None:
    """Print throughput, then the parts of a round."""
    title = f"{arguments.model}, {report.cpu_name()}, {arguments.threads} threads, prompts {arguments.prompts}"
    table = Table(title=title, title_justify="left")
    for column in ("", *SIDES, "plain / generate", "lookup / plain", "lookup / prompt lookup", "tau (acceptance length)", "clean"):
        table.add_column(column, justify="right")
    rounds = Table(title="a round of 16 nodes, ms", title_justify="left")
    for column in ("", "draft", "score", "verify", "commit", "host", "verify + commit + host"):
        rounds.add_column(column, justify="right")
    for result in results:
        rate = {side: result[side]["tokens_per_second"] for side in SIDES}
        ratios = (
            rate["plain"] / rate["generate"],
            rate["lookup"] / rate["plain"],
            rate["lookup"] / rate["generate, prompt lookup"],
        )
        name = ", ".join([result["dtype"], result["sampling"], *result["labels"]])
        clean = min(result[side]["clean"] for side in SIDES)
        tau = result["lookup tau"]["tau"]
        table.add_row(
            name, *(f"{rate[side]:.1f}" for side in SIDES), *(f"{ratio:.2f}x" for ratio in ratios), f"{tau:.2f}", f"{clean:.0%}"
        )
        *parts, share = result["round of 16"].values()
        rounds.add_row(name, *(f"{part:.2f}" for part in parts), f"{share:.1%}")
    console = Console(width=170)
    console.print(table)
    console.print(rounds)


if __name__ == "__main__":
    main()
