"""Turns requests into jobs: encodes prompts, checks every field, chooses the lane. Runs off the event loop.

Every error is an `ApiError` that names the field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

from headstart.engine.grammar import Grammar, GrammarTokens, json_schema, regex
from headstart.serve.errors import ApiError, refused
from headstart.serve.jobs import Job, Mailbox
from headstart.serve.lanes import NONE, Lane
from headstart.serve.protocol import ChatRequest, CompletionRequest, Message, Sampling, TokenizeRequest
from headstart.serve.settings import Settings
from headstart.speculation.noise import draw_seed, mix
from headstart.speculation.params import SamplingParams
from headstart.text.chat_template import check_characters
from headstart.text.text_stream import TextStream
from headstart.text.tokenizer import decode, encode_chat, encode_prompt, stop_token_ids, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_ANSWERS, MOST_STOPS, LONGEST_STOP, MOST_BIASES, MOST_LOGPROBS = 128, 64, 1000, 1024, 20
_COMPLETION_TOKENS = 16  # of a completion without max_tokens, as at OpenAI
_DIRECT = (
    "temperature", "top_p", "top_k", "min_p", "seed", "n", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "stop_token_ids", "ignore_eos",
)  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A request that can run.

    jobs: all answers: `n` of the first prompt, then those of the next.
    num_prompt_tokens: over all prompts.
    echoes: per job, the text that goes before its answer.
    seconds: within which it must be answered.
    """

    jobs: list[Job]
    num_prompt_tokens: int
    echoes: list[str]
    seconds: float


class Preparer:
    """Prepares the requests of one server. Threads may share it.

    tokenizer: the model's.
    lanes: the first is for requests that ask for none.
    settings: limits.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, lanes: Sequence[Lane], settings: Settings) -> None:
        self.tokenizer = tokenizer
        self.lanes = lanes
        self.settings = settings
        self.target = lanes[0].engine.target
        model = self.target.model
        self.stop_ids = stop_token_ids(tokenizer, model.generation_config, model.config)
        self.vocab = min(self.target.vocab, vocabulary_size(tokenizer))
        self._grammar_tokens: GrammarTokens | None = None
        self._lock = Lock()
        tokenizer.encode("a")  # the first call may change the tokenizer's settings, later ones do not

    # -- requests --

    def chat(self, body: ChatRequest, user: str) -> Prepared:
        """Prepare a chat. user: whose turn in the queue it takes."""
        self.check_model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise refused("top_logprobs", "top_logprobs needs logprobs: true")
        if None is not body.max_completion_tokens != body.max_tokens is not None:
            raise refused("max_tokens", "max_tokens and max_completion_tokens differ; give one of them")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        prompt = self._encode_chat(body.messages, body.chat_template_kwargs)
        limit = ("max_completion_tokens", body.max_completion_tokens)
        return self._prepare(body, user, [prompt], [""], logprobs, "messages", limit if limit[1] is not None else None)

    def completion(self, body: CompletionRequest, user: str) -> Prepared:
        """Prepare a completion. user: whose turn in the queue it takes."""
        self.check_model(body.model)
        if body.echo and body.logprobs is not None:
            raise refused("echo", "the log-probabilities of a prompt are not available; leave echo or logprobs out")
        if len(_as_prompts(body.prompt)) > MOST_ANSWERS:
            raise refused("prompt", f"prompt has {len(body.prompt)} items; at most {MOST_ANSWERS} are answered in one request")
        prompts = [self._encode(prompt) for prompt in _as_prompts(body.prompt)]
        echoes = [self._echo(prompt) if body.echo else "" for prompt in _as_prompts(body.prompt)]
        return self._prepare(body, user, prompts, echoes, body.logprobs, "prompt")

    def _prepare(
        self, body: Sampling, user: str, prompts: list[list[int]], echoes: list[str], logprobs: int | None, field: str,
        limit: tuple[str, int | None] | None = None,
    ) -> Prepared:  # fmt: skip
        lane, drafts = self._lane(body)
        sampling, limit = self._sampling(body, logprobs), limit or ("max_tokens", body.max_tokens)
        params = [
            self._params(sampling, lane, prompt, field, self._max_tokens(body, lane, len(prompt), field, *limit))
            for prompt in prompts
        ]
        n = params[0].n
        if n * len(prompts) > min(MOST_ANSWERS, self.settings.max_queue):
            most = min(MOST_ANSWERS, self.settings.max_queue)
            raise refused("n", f"{n * len(prompts)} answers are asked for; at most {most} are made in one request")
        if body.include_trees and not body.stream:
            raise refused("include_trees", "trees come with streamed answers only; set stream: true")
        if body.stream_options is not None and not body.stream:
            raise refused("stream_options", "stream_options needs stream: true")
        grammar, mailbox = self._grammar(body), Mailbox()
        jobs: list[Job] = []
        base = draw_seed() if params[0].seed is None else params[0].seed
        for number, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
            seed, leader = base if len(prompts) == 1 else mix(base, number), None
            for sample in range(n):
                job = Job(
                    lane, tuple(prompt), own, seed if n == 1 else mix(seed, sample), TextStream(self.tokenizer, own.stop), mailbox,
                    index=number * n + sample, user=user, stop_ids=self.stop_ids, drafts=drafts, leader=leader,
                    constraint=grammar() if grammar else None, draws_trees=bool(body.include_trees),
                )  # fmt: skip
                leader = leader or job
                jobs.append(job)
        return Prepared(jobs, sum(map(len, prompts)), [echo for echo in echoes for _ in range(n)], self._seconds(body))

    # -- fields --

    def check_model(self, model: str | None) -> None:
        """Raise ApiError for another model than the one that is served; None: no one is named."""
        if model is not None and model != self.settings.model:
            raise ApiError(404, f"there is no such model; this server has {self.settings.model}", "model", "model_not_found")

    def _lane(self, body: Sampling) -> tuple[Lane, bool]:
        """The lane that a request asks for, and whether its drafter drafts."""
        names = list(dict.fromkeys([*(lane.drafter for lane in self.lanes), NONE]))
        rules = list(dict.fromkeys(lane.accept for lane in self.lanes))
        accept = rules[0] if body.accept is None else body.accept
        if accept not in rules:
            raise refused("accept", f"this server has the acceptance rules {', '.join(rules)}")
        drafter = names[0] if body.drafter is None else body.drafter
        if drafter not in names:
            raise refused("drafter", f"this server has the drafters {', '.join(names)}")
        fitting = [lane for lane in self.lanes if lane.accept == accept]
        return next((lane for lane in fitting if lane.drafter == drafter), fitting[0]), drafter != NONE

    def _sampling(self, body: Sampling, logprobs: int | None) -> dict[str, Any]:
        """The sampling parameters of a request, checked one by one; all but max_tokens."""
        given: dict[str, Any] = {name: value for name in _DIRECT if (value := getattr(body, name)) is not None}
        given.setdefault("temperature", 1.0)  # OpenAI's default
        given["stop"] = self._stops(body.stop)
        given["logit_bias"] = self._biases(body.logit_bias)
        if logprobs is not None:
            given["logprobs"] = logprobs
        of_logprobs = "logprobs" if isinstance(body, CompletionRequest) else "top_logprobs"
        for name, value in given.items():
            with _refusing(of_logprobs if name == "logprobs" else name):
                SamplingParams(**{name: value})
        self._check_tokens("stop_token_ids", given.get("stop_token_ids", ()))
        if (logprobs or 0) > min(MOST_LOGPROBS, self.target.vocab):
            raise refused(of_logprobs, f"{of_logprobs} is {logprobs}; it must be at most {min(MOST_LOGPROBS, self.target.vocab)}")
        return given

    def _params(self, sampling: dict[str, Any], lane: Lane, prompt: Sequence[int], field: str, max_tokens: int) -> SamplingParams:
        """The parameters of one prompt."""
        self._check_tokens(field, prompt)
        params = SamplingParams(**sampling, max_tokens=max_tokens)
        with _refusing(field):
            lane.check(prompt, params)
        return params

    def _max_tokens(self, body: Sampling, lane: Lane, num_prompt: int, field: str, name: str, wanted: int | None) -> int:
        """How many tokens an answer may have. name: the field that says so."""
        left, most = lane.most_tokens - num_prompt, self.settings.max_tokens
        if left < 1:
            message = f"the prompt has {num_prompt} tokens, and {lane.most_tokens} is the most for a prompt and its answer"
            raise refused(field, message, "context_length_exceeded")
        if wanted is None:
            return min(left, most or left, _COMPLETION_TOKENS if isinstance(body, CompletionRequest) else left)
        if wanted < 1:
            raise refused(name, f"{name} is {wanted}; it must be at least 1")
        if most is not None and wanted > most:
            raise refused(name, f"{name} is {wanted}; this server makes answers of at most {most} tokens")
        if wanted > left:
            message = f"{name} is {wanted}, but after a prompt of {num_prompt} tokens there is room for {left}"
            raise refused(name, message, "context_length_exceeded")
        return wanted

    def _stops(self, stop: str | list[str] | None) -> tuple[str, ...]:
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if len(stops) > MOST_STOPS or any(len(one) > LONGEST_STOP for one in stops):
            raise refused("stop", f"stop takes at most {MOST_STOPS} strings of at most {LONGEST_STOP} characters")
        with _refusing("stop"):
            for one in stops:
                check_characters(one, "a stop string")
        return stops

    def _biases(self, biases: dict[str, float] | None) -> dict[int, float]:
        if len(biases or ()) > MOST_BIASES:
            raise refused("logit_bias", f"logit_bias has {len(biases or ())} tokens; at most {MOST_BIASES} are taken")
        for key in biases or ():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise refused("logit_bias", 'a key of logit_bias is no token id; write ids as strings, such as {"50256": -100}')
        tokens = {int(key): bias for key, bias in (biases or {}).items()}
        self._check_tokens("logit_bias", tokens)
        return tokens

    def _check_tokens(self, field: str, tokens: Any) -> None:
        unknown = next((token for token in tokens if not 0 <= token < self.target.vocab), None)
        if unknown is not None:
            raise refused(field, f"token {unknown} is not in the vocabulary of {self.target.vocab} tokens")

    def _seconds(self, body: Sampling) -> float:
        if body.timeout is not None and body.timeout > self.settings.timeout:
            raise refused("timeout", f"timeout is {body.timeout:g}; this server allows {self.settings.timeout:g} seconds")
        return body.timeout or self.settings.timeout

    # -- grammars --

    def _grammar(self, body: Sampling) -> Callable[[], Grammar] | None:
        """What makes a request's constraints, one for each answer; None: it has none."""
        form = body.response_format
        has_form = form is not None and form.type != "text"
        if body.guided_regex is None and not has_form:
            return None
        if body.guided_regex is not None and has_form:
            raise refused("guided_regex", "an answer has a regular expression or a response_format, not both")
        field = "response_format" if has_form else "guided_regex"
        if body.ignore_eos:
            raise refused("ignore_eos", f"{field} says where an answer ends; leave ignore_eos out")
        with _refusing(field):
            if body.guided_regex is not None:
                check_characters(body.guided_regex, field)
                grammar = regex(body.guided_regex)
            else:
                grammar = json_schema(_schema(form))
            tokens = self._tokens_of_grammars()
            Grammar(tokens, grammar)  # read once, so that a wrong one is refused here
        return lambda: Grammar(tokens, grammar)

    def _tokens_of_grammars(self) -> GrammarTokens:
        with self._lock:
            if self._grammar_tokens is None:
                self._grammar_tokens = GrammarTokens(self.tokenizer, self.target.vocab, self.stop_ids)
            return self._grammar_tokens

    # -- text and tokens --

    def tokenize(self, body: TokenizeRequest) -> list[int]:
        """The tokens of a text or a conversation."""
        self.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise refused("prompt", "give prompt or messages, one of them")
        if body.messages is not None:
            return self._encode_chat(body.messages, body.chat_template_kwargs)
        return self._encode(body.prompt or "")

    def detokenize(self, model: str | None, tokens: list[int]) -> str:
        """The text of some tokens, special ones included."""
        self.check_model(model)
        unknown = next((token for token in tokens if not 0 <= token < self.vocab), None)
        if unknown is not None:
            raise refused("tokens", f"token {unknown} is not in the vocabulary of {self.vocab} tokens")
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _encode_chat(self, messages: Sequence[Message], variables: dict[str, Any] | None) -> list[int]:
        template = str(self.tokenizer.chat_template)
        for number, message in enumerate(messages):
            if message.name is not None and "name" not in template:
                raise refused(f"messages[{number}].name", "the model's chat template has no place for a name; leave it out")
        try:
            return encode_chat(self.tokenizer, [message.as_dict() for message in messages], variables)
        except ValueError as error:
            field = "chat_template_kwargs" if "takes no variable" in str(error) else "messages"
            raise refused(field, str(error)) from None

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            if not prompt:
                raise refused("prompt", "the prompt is an empty list; give at least one token id")
            return prompt
        with _refusing("prompt"):
            return encode_prompt(self.tokenizer, prompt)

    def _echo(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else decode(self.tokenizer, prompt)


@contextmanager
def _refusing(field: str) -> Iterator[None]:
    """Turn a ValueError into the error for a field."""
    try:
        yield
    except ValueError as error:
        raise refused(field, str(error)) from None


def _as_prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[Any]:
    """A list of prompts. A list of token ids is one prompt."""
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _schema(form: Any) -> dict[str, Any] | None:
    """The JSON schema of a response format; None: any object."""
    if form.type == "json_object":
        return None
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise ValueError("response_format of type json_schema needs json_schema.schema")
    schema: dict[str, Any] = form.json_schema.schema_
    return schema
