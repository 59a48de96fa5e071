"""The bodies of requests and responses, as OpenAI defines them, as far as LMX uses them."""

from typing import Any, Literal

import msgspec

# -- requests ---------------------------------------------------------------------------------------------------
# Fields are checked by `gateway.validate`, which can say more than a type can. A default means "not given".


class ContentPart(msgspec.Struct):
    """One part of a message's content."""

    type: str
    text: str | None = None


class Message(msgspec.Struct):
    """One turn, as a client writes it."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None
    audio: Any = None


class StreamOptions(msgspec.Struct):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(msgspec.Struct):
    """The supported part of a chat completion request."""

    model: str
    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


# -- responses --------------------------------------------------------------------------------------------------

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(msgspec.Struct):
    """How much of the prompt came from a cache."""

    cached_tokens: int


class CompletionUsage(msgspec.Struct):
    """Token counts; clients rely on all three being there."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class AnswerMessage(msgspec.Struct):
    """What the model said."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class Choice(msgspec.Struct):
    """One answer."""

    message: AnswerMessage
    finish_reason: FinishReason
    index: int = 0
    logprobs: None = None


class ChatCompletion(msgspec.Struct):
    """The answer to a request that does not stream."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: CompletionUsage
    system_fingerprint: str
    object: Literal["chat.completion"] = "chat.completion"


class ModelCard(msgspec.Struct):
    """One model of `/v1/models`: OpenAI's four fields, and what model pickers want besides."""

    id: str
    created: int
    state: str
    max_model_len: int | None
    capabilities: list[str]
    object: Literal["model"] = "model"
    owned_by: str = "lmx"


class ModelList(msgspec.Struct):
    """`/v1/models`."""

    data: list[ModelCard]
    object: Literal["list"] = "list"
