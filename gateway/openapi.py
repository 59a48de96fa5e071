"""`/openapi.json`: what this server offers, assembled from the types and tables that the code itself uses."""

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import msgspec
from starlette.types import Receive, Scope, Send

from gateway import parameters, responses, tools
from gateway.errors import send_json
from gateway.messages import ROLES
from gateway.parameters import Parameters
from gateway.sampling import (
    LOGIT_BIAS,
    MAX_CHOICES,
    MAX_TOP_K,
    MIN_P,
    PENALTY,
    REPETITION,
    TOP_P,
    Range,
)
from gateway.validate import MAX_BEST_OF, MAX_LEGACY_LOGPROBS
from protocol import __version__
from protocol.rules import MAX_STOP_CHARS, MAX_STOPS, MAX_TOOLS, MAX_TOP_LOGPROBS, TOOL_NAME

_REF: Final = "#/components/schemas/{name}"


class Operation(NamedTuple):
    """One route: what it takes and what it gives. `chunk`: an event of it, where it can stream."""

    method: str
    path: str
    summary: str
    response: type[msgspec.Struct]
    takes: Parameters | None = None
    chunk: type[msgspec.Struct] | None = None
    parameters: tuple[Mapping[str, Any], ...] = ()


_MODEL_ID: Final = MappingProxyType({"name": "id", "in": "path", "required": True, "schema": {"type": "string"}})
_FORMAT: Final = MappingProxyType(
    {"name": "format", "in": "query", "schema": {"type": "string", "enum": ["prometheus", "json"]}}
)
OPERATIONS: Final = (
    Operation(
        "post",
        "/v1/chat/completions",
        "Answer a conversation",
        responses.ChatCompletion,
        parameters.CHAT,
        responses.ChatCompletionChunk,
    ),
    Operation(
        "post",
        "/v1/completions",
        "Go on from a prompt",
        responses.Completion,
        parameters.COMPLETION,
        responses.Completion,
    ),
    Operation("post", "/v1/embeddings", "Vectors of texts", responses.EmbeddingList, parameters.EMBEDDING),
    Operation("post", "/v1/rerank", "Order documents by relevance to a query", responses.Ranking, parameters.RERANK),
    Operation("post", "/v1/tokenize", "Tokens of a text or conversation", responses.Tokens, parameters.TOKENIZE),
    Operation("post", "/v1/detokenize", "Text of tokens", responses.Detokenized, parameters.DETOKENIZE),
    Operation("get", "/v1/models", "Every model, in whatever state", responses.ModelList),
    Operation("get", "/v1/models/{id}", "One model", responses.ModelCard, parameters=(_MODEL_ID,)),
    Operation("get", "/healthz", "Whether the server runs", responses.Health),
    Operation(
        "get",
        "/metrics",
        "Metrics, as text for Prometheus or with format=json",
        responses.MetricsDocument,
        parameters=(_FORMAT,),
    ),
    Operation("get", "/readyz", "Whether a request has a chance; 503 if not", responses.Health),
)

#: What the numbers of a request may be. The types do not say: `gateway.sampling` checks, with better words.
_BOUNDS: Final[Mapping[str, tuple[float, float]]] = MappingProxyType(
    {
        "frequency_penalty": (PENALTY.low, PENALTY.high),
        "min_p": (MIN_P.low, MIN_P.high),
        "n": (1, MAX_CHOICES),
        "presence_penalty": (PENALTY.low, PENALTY.high),
        "temperature": (0, 2),
        "top_logprobs": (0, MAX_TOP_LOGPROBS),
        "best_of": (1, MAX_BEST_OF),
    }
)
_ABOVE: Final[Mapping[str, Range]] = MappingProxyType({"repetition_penalty": REPETITION, "top_p": TOP_P})
_SOME: Final = MappingProxyType({"minItems": 1, "minLength": 1})
_FUNCTION: Final = MappingProxyType({"enum": ["function"]})
_NAME: Final = MappingProxyType({"pattern": f"^{TOOL_NAME.pattern}$"})
#: What else is checked where the types say less, by struct and field.
_RULES: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "ChatRequest.max_completion_tokens": {"minimum": 1},
        "ChatRequest.max_tokens": {"minimum": 1},
        "ChatRequest.messages": _SOME,
        "ChatRequest.reasoning_effort": {"enum": [None, *tools.EFFORTS]},
        "ChatRequest.stop": {"maxItems": MAX_STOPS, "minLength": 1, "maxLength": MAX_STOP_CHARS},
        "ChatRequest.tools": {"maxItems": MAX_TOOLS},
        "ChatRequest.top_k": {"minimum": -1, "maximum": MAX_TOP_K},
        "ChatRequest.truncation": {"enum": [None, *tools.TRUNCATIONS]},
        "ChosenFunction.name": _NAME,
        "ChosenTool.type": _FUNCTION,
        "CompletionRequest.max_tokens": {"minimum": 0},
        "CompletionRequest.prompt": {"minItems": 1},
        "CompletionRequest.stop": {"maxItems": MAX_STOPS, "minLength": 1, "maxLength": MAX_STOP_CHARS},
        "CompletionRequest.top_k": {"minimum": -1, "maximum": MAX_TOP_K},
        "ContentPart.type": {"enum": ["text", "refusal"]},
        "Document.text": _SOME,
        "EmbeddingRequest.dimensions": {"minimum": 1},
        "EmbeddingRequest.encoding_format": {"enum": [None, "float", "base64"]},
        "EmbeddingRequest.input": _SOME,
        "JsonSchema.name": _NAME,
        "JsonSchema.schema": {"type": ["object", "null"]},
        "Message.role": {"enum": list(ROLES)},
        "MessageToolCall.type": _FUNCTION,
        "RerankRequest.documents": _SOME,
        "RerankRequest.query": _SOME,
        "RerankRequest.top_n": {"minimum": 1},
        "ResponseFormat.type": {"enum": ["text", "json_object", "json_schema"]},
        "TokenizeRequest.messages": _SOME,
        "TokenizeRequest.tools": {"maxItems": MAX_TOOLS},
        "Tool.type": _FUNCTION,
        "ToolFunction.name": _NAME,
    }
)


class OpenApi:
    """The endpoint."""

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer."""
        await send_json(send, 200, self._body, [])

    @cached_property
    def _body(self) -> bytes:
        """Made when it is first asked for."""
        return msgspec.json.encode(document())


def document() -> dict[str, Any]:
    """Return the OpenAPI document."""
    kinds = {operation.response for operation in OPERATIONS}
    kinds |= {operation.chunk for operation in OPERATIONS if operation.chunk is not None}
    kinds |= {operation.takes.request for operation in OPERATIONS if operation.takes is not None}
    kinds |= {responses.ErrorEnvelope, responses.Problem}
    in_order = sorted(kinds, key=lambda kind: kind.__name__)
    _, schemas = msgspec.json.schema_components(in_order, ref_template=_REF)
    for place, rules in _RULES.items():
        name, _, field = place.partition(".")
        schemas[name]["properties"][field].update(rules)
    for operation in OPERATIONS:
        if operation.takes is not None:
            _complete(schemas[operation.takes.request.__name__]["properties"], operation.takes)
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "LMX",
            "version": __version__,
            "description": "Language models behind OpenAI's API. Every path works with and without /v1.",
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _described(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _ref(operation.response)}}
    if operation.chunk is not None:
        content["text/event-stream"] = {"schema": _event(operation.chunk)}
    failed = {
        "application/json": {"schema": _ref(responses.ErrorEnvelope)},
        "application/problem+json": {"schema": _ref(responses.Problem)},
    }
    described: dict[str, Any] = {
        "operationId": f"{operation.method}_{operation.path.strip('/').replace('/', '_').strip('{}')}",
        "summary": operation.summary,
        "responses": {
            "200": {"description": operation.response.__doc__, "content": content},
            "default": {"description": responses.ErrorEnvelope.__doc__, "content": failed},
        },
    }
    if operation.path == "/metrics":
        content["text/plain"] = {"schema": {"type": "string"}}
    if operation.path == "/readyz":
        described["responses"]["503"] = described["responses"]["200"]
    if operation.parameters:
        described["parameters"] = [dict(parameter) for parameter in operation.parameters]
    if operation.takes is not None:
        body = {"application/json": {"schema": _ref(operation.takes.request)}}
        described["requestBody"] = {"required": True, "content": body}
    return described


def _event(chunk: type[msgspec.Struct]) -> dict[str, Any]:
    """Describe one event of a stream, as tools read it that know OpenAPI 3.1; comments are no events."""
    read = {
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_ref(chunk), _ref(responses.ErrorEnvelope)]},
    }
    return {
        "type": "object",
        "properties": {
            "event": {"type": "string", "description": "`error` for one that ends the stream without [DONE]."},
            "data": {"type": "string", "anyOf": [{"const": "[DONE]"}, read]},
        },
        "required": ["data"],
    }


def _complete(properties: dict[str, Any], takes: Parameters) -> None:
    """Say what the types do not: bounds, and the parameters that are refused or have no effect."""
    properties["model"]["minLength"] = 1
    for name, schema in properties.items():
        if name in _BOUNDS:
            schema["minimum"], schema["maximum"] = _BOUNDS[name]
        elif name in _ABOVE:
            schema["exclusiveMinimum"], schema["maximum"] = _ABOVE[name].low, _ABOVE[name].high
    if "logit_bias" in properties:
        properties["logit_bias"]["description"] = f"Token id to a bias, {LOGIT_BIAS.low:g} to {LOGIT_BIAS.high:g}."
    if takes is parameters.COMPLETION:
        properties["logprobs"].update(minimum=0, maximum=MAX_LEGACY_LOGPROBS)
    for name, values in takes.neutral.items():
        properties[name] = {"enum": [None, *values], "description": "Not supported: any other value is refused."}
    for name in sorted(takes.without_effect):
        properties[name] = {"description": "Accepted without effect."}


def _ref(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _REF.format(name=kind.__name__)}
