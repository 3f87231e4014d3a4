"""This engine's side of a comparison: chains of drafts on the CPU, greedily, one request at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headstart.bench.conformance.rounds import Decoded
from headstart.bench.tasks import encode_prompt_sets, read_prompt_sets
from headstart.engine.llm import LLM, load
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Chain

SLACK = 16  # tokens of the context that stay free, so that an engine drafts until the end


@dataclass(frozen=True)
class Plan:
    """What both engines decode.

    model: folder or hub id of the target; None: the embedded model.
    prompts: prompt sets, as `headstart bench` takes them; empty: questions where the model has a chat template, else stories.
    limit: only the first so many prompts of each set.
    max_tokens: of each answer, whose end is ignored.
    drafts: length of the chain; None: as the export says.
    """

    model: str | None
    prompts: tuple[str, ...] = ()
    limit: int | None = 8
    max_tokens: int = 64
    drafts: int | None = None
    trust_remote_code: bool = False


def decode(plan: Plan, heads: str | Path | None) -> tuple[list[list[int]], list[Decoded]]:
    """The prompts' token ids, and this engine's answers in fp32.

    heads: folder of native heads; None: plain decoding.
    Raises ValueError for heads of another model, and for prompts that cannot be read.
    """
    drafter, planner = (None, None) if heads is None else (str(heads), Chain(plan.drafts or 1))
    with load(
        plan.model,
        drafter=drafter,
        planner=planner,
        dtype="float32",
        device="cpu",
        max_rows=1,
        trust_remote_code=plan.trust_remote_code,
    ) as llm:
        prompts = _prompts(llm, plan)
        return prompts, [_decode(llm, prompt, plan.max_tokens) for prompt in prompts]


def _prompts(llm: LLM, plan: Plan) -> list[list[int]]:
    sources = plan.prompts or ("questions" if llm.tokenizer.chat_template is not None else "stories",)
    sets = read_prompt_sets(sources, plan.limit)
    tasks, _ = encode_prompt_sets(llm, sets, plan.max_tokens + 2 * (plan.drafts or 0) + SLACK)
    return [list(task.prompt) for task in tasks]


def _decode(llm: LLM, prompt: Sequence[int], max_tokens: int) -> Decoded:
    request = llm.engine.add(prompt, SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True))
    for _ in llm.engine.run():
        pass
    return Decoded(tuple(request.output), tuple(part.tokens for part in request.rounds if part.tokens))
