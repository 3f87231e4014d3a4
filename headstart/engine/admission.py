"""Checks whether a target can run a request at all."""

from __future__ import annotations

from collections.abc import Sequence

from headstart.drafters import Drafter
from headstart.speculation.params import SamplingParams
from headstart.speculation.verify import Rule
from headstart.target.target import Target


def check_prompt(target: Target, prompt: Sequence[int], params: SamplingParams, *, has_stream: bool) -> None:
    """Raise ValueError for a request that the target can never run.

    Refused are an empty prompt, one that exceeds the context with its answer, tokens that are not in the vocabulary, more
    log-probabilities than it has tokens, and stop strings without a text stream.
    """
    limit = target.context
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token")
    if len(prompt) + params.max_tokens > limit:
        raise ValueError(
            f"prompt of {len(prompt)} tokens plus max_tokens={params.max_tokens} exceeds the context of {limit} tokens of "
            f"{target.name}; {_way_out(len(prompt), limit)}"
        )
    if params.stop and not has_stream:
        raise ValueError("stop strings need a tokenizer; use headstart.load, or hand the engine a TextStream")
    unknown = [token for token in (*prompt, *params.logit_bias, *params.stop_token_ids) if not 0 <= token < target.vocab]
    if unknown:
        raise ValueError(f"token {unknown[0]} is not in the vocabulary of {target.vocab} of {target.name}")
    if (params.logprobs or 0) > target.vocab:
        raise ValueError(f"logprobs is {params.logprobs}; the vocabulary has {target.vocab} tokens to choose from")


def _way_out(num_prompt: int, limit: int) -> str:
    if num_prompt < limit:
        return f"lower max_tokens to {limit - num_prompt}"
    return f"shorten the prompt to less than {limit} tokens"


def check_rule(drafter: Drafter | None, rule: Rule) -> None:
    """Raise ValueError for an acceptance rule under which a drafter would not be exact."""
    if drafter is not None and getattr(drafter, "refused_noise", None) == rule.noise:
        raise ValueError(
            f"drafter {drafter.name} joins drafts of several sources, which is not exact with accept='rejection'; take "
            "accept='coupled', or one of these drafters alone"
        )
