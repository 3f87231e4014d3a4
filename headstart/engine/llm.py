"""`LLM` and `load`: a model, its tokenizer, a drafter and an engine as one object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

import torch

from headstart.drafters import Drafter
from headstart.engine.answers import Answer, Answering
from headstart.engine.choosing import choose_drafter
from headstart.engine.drafter_loading import make, read_planner
from headstart.engine.engine import Engine
from headstart.engine.planning import planner_for
from headstart.engine.scheduler import Request
from headstart.engine.stats import Stats
from headstart.speculation.noise import draw_seed, mix
from headstart.speculation.params import SamplingParams, SamplingSettings, read_settings
from headstart.speculation.planner import Planner
from headstart.speculation.rules import parse_rule
from headstart.speculation.verify import Rule
from headstart.target.loading import check_folder, embedded
from headstart.target.target import Target
from headstart.target.tokenizer_loading import load_tokenizer
from headstart.text.text_stream import TextStream
from headstart.text.tokenizer import Prompt, encode_chat, encode_prompt, stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LLM:
    """A loaded model that answers prompts. Made by `headstart.load`.

    As a context manager it releases the model at the end.

    engine: runs the requests.
    tokenizer: the model's.
    """

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.is_released = False
        model = engine.target.model
        self.stop_ids = stop_token_ids(tokenizer, model.generation_config, model.config)

    def __repr__(self) -> str:
        target, drafter = self.engine.target, self.engine.drafter
        exact = "exact" if target.is_exact else "not exact"
        parts = [Path(target.name).name, f"drafter {drafter.name if drafter else None}"]
        if drafter:
            planner = str(self.engine.planner)
            parts.append(f"planner {planner if len(planner) < 80 else type(self.engine.planner).__name__}")
        parts += [exact, str(target.dtype).removeprefix("torch."), str(target.device)]
        return f"<LLM {', '.join(parts)}{', released' if self.is_released else ''}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.release()

    def release(self) -> PreTrainedModel:
        """Return the model as it was before `load`. This object can no longer answer prompts."""
        self.is_released = True
        return self.engine.target.release()

    @property
    def stats(self) -> Stats:
        """Statistics of all rounds so far."""
        return self.engine.stats

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, **settings: Unpack[SamplingSettings]
    ) -> list[Answer]:
        """Complete one prompt or several at once. Returns `n` answers to each prompt, in order.

        prompts: a string is continued as it stands (`chat` applies the chat template); a prompt may also be a list of chat messages
            or of token ids. A list of strings or lists holds several prompts.
        params: None: the defaults of `SamplingParams`.
        settings: fields of `SamplingParams`, which replace those of `params`.

        Raises ValueError, before any work is done, for anything that cannot be honoured.
        """
        answering = self.start(_as_prompts(prompts), read_settings(params, settings))
        for _ in answering:
            pass
        return answering.answers

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **settings: Unpack[SamplingSettings]) -> Answering:
        """The answer to one prompt, to be iterated fragment by fragment.

        Leaving the loop early ends the request, as does dropping the stream or `close`. Several streams may be read by turns or in
        several threads, and `generate` may be called while one is read. A stream that is kept and not read still has a row in the
        rounds of the others once it has a seat; its fragments wait for its reader.

        prompt, params, settings: as in `generate`; `n` must be 1.

        Raises ValueError for anything that cannot be honoured.
        """
        params = read_settings(params, settings)
        if params.n != 1:
            raise ValueError(f"n is {params.n}; a stream has one answer, use generate for several")
        return self.start([prompt], params)

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **settings: Unpack[SamplingSettings],
    ) -> list[Answer]:
        """Answer a conversation, formatted by the model's chat template. Returns `n` answers.

        messages: the user's message as a string, or a list of messages with 'role' and 'content'.
        chat_template_kwargs: variables of the template, such as {"enable_thinking": False}.
        params, settings: as in `generate`.

        Raises ValueError for a model without a chat template and for a variable that its template does not read.
        """
        ids = encode_chat(self.tokenizer, messages, chat_template_kwargs)
        return self.generate(ids, params, **settings)

    def chat_stream(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **settings: Unpack[SamplingSettings],
    ) -> Answering:
        """The answer of `chat`, to be iterated fragment by fragment as that of `stream`."""
        return self.stream(encode_chat(self.tokenizer, messages, chat_template_kwargs), params, **settings)

    def start(self, prompts: Sequence[Prompt], params: SamplingParams) -> Answering:
        """Queue `n` answers to each prompt. They run while this result, or another one of the same engine, is iterated."""
        if self.is_released:
            raise ValueError(f"the model {self.engine.target.name} was released from this LLM; load it again to use it")
        base = draw_seed() if params.seed is None else params.seed
        answering = Answering(self.engine)
        with answering.closed_on_error():
            for index, prompt in enumerate(prompts):
                self._submit(answering, prompt, params, base if len(prompts) == 1 else mix(base, index))
        return answering

    def _submit(self, answering: Answering, prompt: Prompt, params: SamplingParams, seed: int) -> None:
        ids = encode_prompt(self.tokenizer, prompt)
        leader: Request | None = None
        for sample in range(params.n):
            sample_seed = seed if params.n == 1 else mix(seed, sample)
            stream = TextStream(self.tokenizer, params.stop)
            request = answering.add(ids, params, seed=sample_seed, stop_ids=self.stop_ids, stream=stream, leader=leader)
            leader = leader or request


def load(
    model: str | Path | PreTrainedModel | None = None,
    *,
    drafter: str | Drafter | None = "auto",
    planner: Planner | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    exact: bool | str = "auto",
    weights: str = "stored",
    max_rows: int = 8,
    memory: int | None = None,
    accept: str = "coupled",
    trust_remote_code: bool = False,
) -> LLM:
    """Load a model, and a drafter that makes it answer faster.

    The model's attention is replaced and its linear layers are packed in place. `LLM.release` undoes both, as does the end of a
    `with headstart.load(...) as llm:` block.

    model: a folder, a hub id, a transformers model object (then with its `tokenizer`), or None: the embedded model.
    drafter: "auto" (of the heads in the model's own files or in folders beside them, those of highest expected speed, joined with
        lookup; else lookup alone), "auto:NAME,NAME" (the same, of these drafters), "lookup", "lookup+NAME" (both in one tree),
        "model:PATH" (a draft model), a folder of heads or their `owner/name` on the hub, a method's name for heads that
        come with the model, a drafter object, or None: plain decoding.
    planner: how much to speculate: a planner object, a string such as "chain:5" or "tree:8" (the tree measured for temperature 0),
        or None: by the measured cost of rounds on this machine, and by what the drafter was right about so far (`Adaptive`);
        with another acceptance rule than "coupled" the drafter's own.
    tokenizer: None: the one in the model's folder.
    device: such as "cpu" or "cuda:0"; "auto": CUDA where torch sees a GPU, else the CPU.
    dtype: of weights and KV cache; "auto": the one in which the weights are stored.
    exact: "auto": the same bits as plain decoding wherever a CPU can give them (`llm.engine.target.kernel_choice.why_not` names
        what prevents it); True: required; False: the fastest kernels.
    weights: "stored", or "int8": the weights of the model's linears are rounded, which is faster and changes its answers a little;
        for bf16 on a CPU with compiled kernels.
    max_rows: requests that run at once.
    memory: bytes for keys and values; None: as in `Engine`.
    accept: acceptance rule: "coupled" (same text as plain decoding), "rejection" (same distribution) or "typical" (lossy: another
        distribution, and `Answer.is_lossy` is true).
    trust_remote_code: whether Python files in the folders of the model, its tokenizer and a draft model may run. No question is
        asked.

    Raises ValueError, in one sentence, for a path or a setting that is wrong.
    """
    chosen, rule = read_planner(planner, drafter, model), parse_rule(accept)
    source: Any = embedded("target") if model is None else model
    if isinstance(source, str | Path):
        check_folder(source)
        tokenizer = tokenizer or load_tokenizer(source, trust_remote_code)
        target = Target.load(source, dtype=dtype, device=device, exact=exact, trust_remote_code=trust_remote_code, weights=weights)
    else:
        if weights != "stored":
            raise ValueError(
                f"weights={weights!r} would change the model object that load was given; load it from its folder instead"
            )
        if tokenizer is None:
            raise ValueError("load was given a model object without its tokenizer; pass tokenizer=...")
        target = Target(source)
        target.trust_remote_code = trust_remote_code
        target.choose_kernels(exact)
    try:
        if isinstance(drafter, str):
            drafter = named_drafter(drafter, model, target, rule)
        engine_planner = planner_for(target, drafter, chosen, rule)
        return LLM(Engine(target, drafter, engine_planner, max_rows=max_rows, memory=memory, accept=accept), tokenizer)
    except BaseException:
        target.release()  # a model object goes back to the caller as it was
        raise


def named_drafter(spec: str, model: object, target: Target, rule: Rule) -> Drafter:
    """The drafter that a user names, as `load` reads it."""
    name, colon, specs = spec.partition(":")
    if name != "auto":
        return make(spec, target)
    if colon and not all(specs.split(",")):
        raise ValueError(f"drafter {spec!r} lacks a name after auto:, or between its commas; write auto, or auto:NAME,NAME")
    return choose_drafter(model, target, rule, specs.split(",") if specs else ())


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts. A list of strings or lists holds several; a list of messages or token ids is one."""
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence) or (prompts and isinstance(prompts[0], int | dict)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
