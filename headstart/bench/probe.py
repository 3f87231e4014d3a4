"""A quick measure of heads: a few prompts decoded with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headstart.bench.calibrate import DecodeTrial
from headstart.bench.suites import SUITES
from headstart.bench.tasks import encode_tasks
from headstart.engine.drafter_loading import heads_in
from headstart.engine.llm import LLM

NUM_PROMPTS = 4
MAX_TOKENS = 64
TEMPERATURE = 0.7  # greedy answers of small models loop, which flatters drafters


def probe(llm: LLM, heads: str | Path) -> dict[str, Any]:
    """tau and the acceptance rate by depth of a few decoded prompts, and the temperature they depend on.

    llm: the model to draft for.
    heads: a folder of native heads.
    Raises ValueError for heads that are damaged or another model's.
    """
    drafter = heads_in(heads, llm.engine.target)
    suite = SUITES["questions" if llm.tokenizer.chat_template is not None else "stories"]
    tasks, _ = encode_tasks(llm, suite[:NUM_PROMPTS], MAX_TOKENS)
    trial = DecodeTrial(llm.engine.target, tuple(task.prompt for task in tasks), MAX_TOKENS, 0, llm.stop_ids)
    stats = trial.decode(drafter, drafter.planner, TEMPERATURE)
    return {"tau": round(stats.tau, 3), "acceptance": [round(share, 3) for share in stats.acceptance], "temperature": TEMPERATURE}
