"""Drafters and planners side by side, on one target, in one process. python examples/compare_drafters.py [MODEL [DRAFT_MODEL]]"""

import sys

from rich.console import Console

import headstart
from headstart.bench import report, runner, suites
from headstart.target.loading import embedded
from headstart.text.tokenizer import encode_prompt

model, draft = [*sys.argv[1:], None, None][:2] if len(sys.argv) > 1 else (None, embedded("draft"))
llm = headstart.load(model, drafter=None, max_rows=1, dtype="float32")

# DRAFTER or DRAFTER@PLANNER, as on the command line. Plain decoding always runs, and all are compared with it.
specs = ["lookup", "lookup@chain:4"]
if draft:
    specs += [f"model:{draft}@chain:3", f"model:{draft}@best:nodes=8,depth=4"]

tasks = tuple(runner.Task(tuple(encode_prompt(llm.tokenizer, case.prompt))) for case in suites.load_cases("stories", 4))
params = headstart.SamplingParams(max_tokens=64, temperature=0.7, seed=1)
setup = runner.Setup(llm.engine.target, tasks, params, llm.stop_ids)

samples = runner.measure(setup, runner.prepare(setup, specs))
rows = report.rows(setup, samples)
Console(width=160).print(report.table(rows, f"{llm.engine.target.name}, temperature 0.7", is_short=True))
