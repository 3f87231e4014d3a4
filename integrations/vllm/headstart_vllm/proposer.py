"""The class that vLLM makes for `{"model": "headstart_vllm.Proposer"}`, and the one place where vLLM's code is changed.

vLLM gives a `custom_class` proposer the sampled tokens, but no hidden states. `connect` therefore wraps the method of its model
runner that calls proposers, and passes the hidden states on to this one; all other proposers are called as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from headstart_vllm.heads import Target, read

OPTION = "headstart_heads"  # key of vLLM's `additional_config`
NEEDED = ("sampled_token_ids", "sample_hidden_states", "spec_decode_metadata")  # arguments of the wrapped method


class Proposer:
    """Drafts chains with the heads in the folder that `additional_config["headstart_heads"]` names.

    Raises ValueError, in one sentence, for a folder without such heads, and for heads that do not fit the target or the number of
    drafts.
    """

    def __init__(self, vllm_config: Any) -> None:
        options = vllm_config.additional_config
        folder = options.get(OPTION) if isinstance(options, dict) else None
        if not folder:
            raise ValueError(f'the folder of the heads is missing; pass --additional-config \'{{"{OPTION}": "FOLDER"}}\'')
        self.heads = read(folder)
        self.count = int(vllm_config.speculative_config.num_speculative_tokens)
        self._dtype: torch.dtype = vllm_config.model_config.dtype
        self._check(vllm_config.model_config)
        self._target: Target | None = None
        connect()

    def _check(self, model_config: Any) -> None:
        heads, sizes = self.heads, (model_config.get_hidden_size(), model_config.get_vocab_size())
        if (heads.hidden, heads.vocab) != sizes:
            raise ValueError(
                f"these heads are for a hidden size of {heads.hidden} and a vocabulary of {heads.vocab}, the target has "
                f"{sizes[0]} and {sizes[1]}; name heads that were trained for it"
            )
        if self.count > heads.depth:
            raise ValueError(
                f"num_speculative_tokens is {self.count}, but these are {heads.depth} heads; lower it to {heads.depth}"
            )

    def load_model(self, model: Any) -> None:
        """Called by vLLM with the target, once it is loaded."""
        self.heads.to(next(model.parameters()).device, self._dtype)
        self._target = Target(model.embed_input_ids, model.compute_logits)

    def propose(self, *arguments: Any, **named: Any) -> list[list[int]]:
        """What vLLM calls where `connect` had no effect. Raises RuntimeError: there are no hidden states to draft from."""
        raise RuntimeError("vLLM calls proposers in a way that headstart-vllm does not know; use a version that its README names")

    def propose_from(self, sampled: Sequence[Sequence[int]], states: Tensor, num_drafts: Sequence[int] | None) -> list[list[int]]:
        """The drafts of each request; none for one whose prompt is not read to the end.

        sampled: per request, the tokens that the last pass gave: the kept drafts and one more.
        states: [logits, hidden], the last hidden states of all tokens that had logits, request after request.
        num_drafts: per request, how many drafts were verified, so that it has one more row of `states`; None: none were.
        """
        assert self._target is not None, "vLLM loads the target before it asks for drafts"
        counts = num_drafts or [0] * len(sampled)
        rows = [index for index, tokens in enumerate(sampled) if len(tokens)]
        if not rows:
            return [[] for _ in sampled]
        starts = [sum(counts[:index]) + index for index in rows]
        lasts = [start + len(sampled[row]) - 1 for start, row in zip(starts, rows, strict=True)]
        roots = torch.tensor([sampled[row][-1] for row in rows], device=states.device)
        drafts = self.heads.draft(states[torch.tensor(lasts, device=states.device)], roots, self.count, self._target).tolist()
        drafted = dict(zip(rows, drafts, strict=True))
        return [drafted.get(index, []) for index in range(len(sampled))]


def connect() -> None:
    """Let vLLM's model runner pass hidden states to `Proposer`; the second time nothing is done."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    method = GPUModelRunner.propose_draft_token_ids
    if not getattr(method, "has_hidden_states", False):
        GPUModelRunner.propose_draft_token_ids = with_hidden_states(method)


def with_hidden_states(method: Callable[..., Any]) -> Callable[..., Any]:
    """`propose_draft_token_ids` of a model runner, which asks a `Proposer` itself.

    Raises RuntimeError where the method lacks one of the arguments that are needed.
    """
    signature = inspect.signature(method)
    if missing := [name for name in NEEDED if name not in signature.parameters]:
        raise RuntimeError(f"this vLLM gives proposers no {missing[0]}; use a version that the README of headstart-vllm names")

    @wraps(method)
    def propose(runner: Any, *arguments: Any, **named: Any) -> Any:
        if not isinstance(runner.drafter, Proposer):
            return method(runner, *arguments, **named)
        given = signature.bind(runner, *arguments, **named).arguments
        sampled, states, metadata = (given[name] for name in NEEDED)
        return runner.drafter.propose_from(sampled, states, metadata and metadata.num_draft_tokens)

    propose.has_hidden_states = True  # type: ignore[attr-defined]
    return propose
