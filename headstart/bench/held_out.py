"""Speculative decoding of held-out prompts while heads are trained; training itself must not import the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from headstart.engine.engine import Engine
from headstart.speculation.params import SamplingParams
from headstart.target.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headstart.drafters.parts.heads import Heads

TEMPERATURE = 0.7  # greedy answers of small models loop, which flatters drafters


def decode_held_out(model: PreTrainedModel, heads: Heads, prompts: Sequence[Sequence[int]], max_tokens: int) -> float:
    """tau (acceptance length) of heads that are being trained, over prompts that are decoded at once.

    model: the model that is being trained or drafted for; it is given back as it was.
    prompts: token ids; the end of each, where it exceeds the context.
    max_tokens: of each answer.
    """
    target = Target(model, check=False)
    try:
        engine = Engine(target, heads, max_rows=len(prompts))
        max_prompt = target.context - max_tokens
        for seed, prompt in enumerate(prompts):
            params = SamplingParams(max_tokens=max_tokens, temperature=TEMPERATURE, ignore_eos=True)
            engine.add(list(prompt[-max_prompt:]), params, seed=seed)
        for _ in engine.run():
            pass
        return float(engine.stats.tau)
    finally:
        target.release()
