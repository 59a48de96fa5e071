"""The bodies of responses, as OpenAI defines them. Where tokenizing is concerned, as vLLM does."""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from gateway.schemas import Document

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(msgspec.Struct):
    """How much of the prompt came from a cache."""

    cached_tokens: int


class CompletionUsage(msgspec.Struct):
    """Token counts; clients rely on all three being there."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct):
    """One of the likeliest tokens of a position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    """A token of the answer, its bytes, and what might have been in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(msgspec.Struct):
    """Of one choice, or of one piece of it."""

    content: list[TokenLogprob]
    refusal: None = None


class Function(msgspec.Struct):
    """What is called, and with what: `arguments` is JSON, as text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """One call of a tool."""

    id: str
    function: Function
    type: Literal["function"] = "function"


class AnswerMessage(msgspec.Struct):
    """What the model said."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class Choice(msgspec.Struct):
    """One answer."""

    message: AnswerMessage
    finish_reason: FinishReason
    index: int = 0
    logprobs: ChoiceLogprobs | None = None


class ChatCompletion(msgspec.Struct):
    """The answer to a chat that does not stream."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: CompletionUsage
    system_fingerprint: str
    object: Literal["chat.completion"] = "chat.completion"


class FunctionPiece(msgspec.Struct):
    """`name` comes with the first piece of a call; `arguments` are appended."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallPiece(msgspec.Struct):
    """A piece of the `index`-th call; `id` and `type` come with the first."""

    index: int
    function: FunctionPiece
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Delta(msgspec.Struct):
    """What a choice gained."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallPiece] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    """A piece of one choice."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(msgspec.Struct):
    """One event of a chat that streams. `usage` is there if it was asked for, null on all but the last."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: CompletionUsage | UnsetType | None = UNSET


class LegacyLogprobs(msgspec.Struct):
    """Logprobs of `/v1/completions`, in parallel lists. The first token of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(msgspec.Struct):
    """One answer, or a piece of one: then `finish_reason` is null but on its last."""

    text: str
    index: int
    logprobs: LegacyLogprobs | None
    finish_reason: FinishReason | None


class Completion(msgspec.Struct):
    """The answer of `/v1/completions`; also each event of its stream."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    system_fingerprint: str
    object: Literal["text_completion"] = "text_completion"
    usage: CompletionUsage | UnsetType | None = UNSET


class Tokens(msgspec.Struct):
    """The answer of `/tokenize`."""

    count: int
    max_model_len: int | None
    tokens: list[int]


class Detokenized(msgspec.Struct):
    """The answer of `/detokenize`."""

    prompt: str


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


class ErrorDetail(msgspec.Struct):
    """What went wrong, in OpenAI's words; `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str
    request_id: str


class ErrorEnvelope(msgspec.Struct):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class Problem(msgspec.Struct):
    """The same as RFC 9457 problem details, for a client that accepts `application/problem+json`."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    param: str | None
    request_id: str


class Health(msgspec.Struct):
    """`/healthz`, `/readyz`."""

    status: Literal["ok", "ready", "unavailable"]
    version: str
    models_loaded: int | UnsetType = UNSET
    reason: str | UnsetType = UNSET
    #: Of the machine's memory in use; null while it is not known.
    memory_percent: float | UnsetType | None = UNSET


class MetricSample(msgspec.Struct):
    """One value of a metric."""

    name: str
    labels: dict[str, str]
    value: float


class Metric(msgspec.Struct):
    """One metric with all its values."""

    name: str
    type: str
    help: str
    samples: list[MetricSample]


class MetricsDocument(msgspec.Struct):
    """`/metrics?format=json`."""

    schema: Literal["lmx.metrics/1"]
    metrics: list[Metric]


class Embedding(msgspec.Struct):
    """One vector; with `encoding_format` base64 its little-endian float32 bytes. Sent by `gateway.embeddings`."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(msgspec.Struct):
    """Tokens of the inputs; of a ranking, of query and documents."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct):
    """The answer of `/v1/embeddings`."""

    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class RankedDocument(msgspec.Struct):
    """One document: where it stood in the request, and how relevant it is."""

    index: int
    relevance_score: float
    document: Document | UnsetType = UNSET


class Ranking(msgspec.Struct):
    """The answer of `/v1/rerank`, the most relevant document first."""

    id: str
    model: str
    results: list[RankedDocument]
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


def encode(value: Any) -> bytes:
    """Return one of these as JSON."""
    return msgspec.json.encode(value)
