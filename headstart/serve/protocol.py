"""Requests of OpenAI's interface as pydantic reads them. What a field means is decided in `preparing`; unknown fields are refused.

A field that is null is one that was left out, as at OpenAI.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Number = Annotated[float, Field(allow_inf_nan=False)]
TokenIds = list[int]


def _only(*neutral: Any) -> AfterValidator:
    """Accepts nothing but values that ask for nothing."""

    def check(value: Any) -> None:
        if value is not None and not any(value == one and type(value) is type(one) for one in neutral):
            raise ValueError("this server cannot honour it; leave it out")

    return AfterValidator(check)


Unsupported = Annotated[Any, _only()]


class Strict(BaseModel):
    """A model that refuses unknown fields and values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


# -- chats ------------------------------------------------------------------------------------------------------------------


class TextPart(Strict):
    """A part of a message's content. Only text is supported."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One message of a conversation. Messages of an answer can be sent back as they came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: Unsupported = None
    annotations: Annotated[Any, _only([])] = None
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_calls: Annotated[Any, _only([])] = None

    def as_dict(self) -> dict[str, str]:
        """The message for a chat template."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        name = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": content, **name}


# -- what chats and completions share ---------------------------------------------------------------------------------------


class StreamOptions(Strict):
    """include_usage: a last event has the number of tokens. continuous_usage_stats: every event has it."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[Any, _only(False)] = None


class JsonSchema(Strict):
    """A JSON schema that the answer must have."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(Strict):
    """Fields of chats and completions. Those after `user` are not OpenAI's, but vLLM's or ours."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None

    top_k: int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    guided_regex: str | None = None
    return_token_ids: bool | None = None
    drafter: str | None = None
    accept: str | None = None
    timeout: Annotated[Number, Field(gt=0)] | None = None
    include_metrics: bool | None = None
    include_trees: bool | None = None

    service_tier: Annotated[Any, _only("auto", "default")] = None
    store: Annotated[Any, _only(False)] = None
    metadata: Annotated[Any, _only({})] = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    tools: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none")] = None
    parallel_tool_calls: Unsupported = None
    functions: Annotated[Any, _only([])] = None
    function_call: Annotated[Any, _only("none")] = None
    modalities: Annotated[Any, _only(["text"])] = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    logprobs: int | None = None
    echo: bool | None = None

    suffix: Annotated[Any, _only("")] = None
    best_of: Annotated[Any, _only(1)] = None


# -- tokens -----------------------------------------------------------------------------------------------------------------


class TokenizeRequest(Strict):
    """POST /tokenize: of a text, or of a conversation in the model's chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds
