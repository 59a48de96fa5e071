"""The bodies of requests, as OpenAI defines them, as far as LMX uses them.

Fields are checked by `gateway.validate`, which can say more than a type can. A default means "not given".
"""

from typing import Any

import msgspec

# -- conversations ------------------------------------------------------------------------------------------------


class ContentPart(msgspec.Struct):
    """One part of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = None


class MessageFunction(msgspec.Struct):
    """What an assistant called; `arguments` is JSON, as text."""

    name: str
    arguments: str


class MessageToolCall(msgspec.Struct):
    """A call in an assistant's message."""

    id: str
    type: str = "function"
    function: MessageFunction | None = None


class Message(msgspec.Struct):
    """One turn, as a client writes it."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    #: Another name of the same.
    reasoning: str | None = None
    refusal: str | None = None
    function_call: Any = None
    audio: Any = None
    #: OpenAI's links to the web; a client that sends back what it got sends them too.
    annotations: Any = None


class ToolFunction(msgspec.Struct):
    """What may be called."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    """One of `tools`."""

    type: str
    function: ToolFunction | None = None


class ChosenFunction(msgspec.Struct):
    """The name in a `tool_choice`."""

    name: str


class ChosenTool(msgspec.Struct):
    """A `tool_choice` that is not one of the words."""

    type: str
    function: ChosenFunction | None = None


class JsonSchema(msgspec.Struct):
    """The schema that an answer has to follow. `schema` is read by the model's process."""

    name: str
    schema: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    """`response_format`."""

    type: str
    json_schema: JsonSchema | None = None


# -- generation ---------------------------------------------------------------------------------------------------


class StreamOptions(msgspec.Struct):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Generation(msgspec.Struct, kw_only=True):
    """What the two generating endpoints have in common."""

    model: str
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    min_p: float | None = None
    n: int | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


class ChatRequest(Generation, kw_only=True):
    """The supported part of a chat completion request."""

    messages: list[Message]
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    logprobs: bool | None = None
    max_completion_tokens: int | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    response_format: ResponseFormat | None = None
    tool_choice: str | ChosenTool | None = None
    tools: list[Tool] | None = None
    top_logprobs: int | None = None
    truncation: str | None = None


class CompletionRequest(Generation, kw_only=True):
    """The supported part of a completion request."""

    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None


# -- tokens -------------------------------------------------------------------------------------------------------


class TokenizeRequest(msgspec.Struct):
    """`/tokenize`: a prompt, or a conversation."""

    model: str
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct):
    """`/detokenize`."""

    model: str
    tokens: list[int]


# -- embeddings and ranking ---------------------------------------------------------------------------------------


class EmbeddingRequest(msgspec.Struct):
    """`/v1/embeddings`."""

    model: str
    input: str | list[str | int | list[int]]
    encoding_format: str | None = None
    dimensions: int | None = None


class Document(msgspec.Struct):
    """A document, as Cohere and Jina write one that is not a plain string."""

    text: str


class RerankRequest(msgspec.Struct):
    """`/v1/rerank`, in the shape of Cohere and Jina."""

    model: str
    query: str
    documents: list[str | Document]
    top_n: int | None = None
    return_documents: bool | None = None
