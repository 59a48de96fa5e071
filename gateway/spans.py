"""What a span says of a call: OpenTelemetry's attributes for generative AI, and never a word of prompt or answer."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from gateway.call import Call
from protocol.data import Kind, Submit
from protocol.tracing import Value

_OPERATIONS: Final[Mapping[Kind, str]] = MappingProxyType(
    {Kind.CHAT: "chat", Kind.COMPLETION: "text_completion", Kind.EMBED: "embeddings", Kind.RERANK: "rerank"}
)


def span_name(kind: Kind, model: str) -> str:
    """Return the name of a call's span: the operation and the model."""
    return f"{_operation(kind)} {model}"


def asked_for(model: str, asked: Sequence[Submit]) -> dict[str, Value]:
    """Return what is known when a call begins."""
    first = asked[0]
    known: dict[str, Value] = {
        "gen_ai.operation.name": _operation(first.kind),
        "gen_ai.provider.name": "lmx",
        "gen_ai.request.model": model,
    }
    if first.kind in (Kind.CHAT, Kind.COMPLETION):
        sampling = first.sampling
        known |= {"gen_ai.request.temperature": sampling.temperature, "gen_ai.request.top_p": sampling.top_p}
        if sampling.max_tokens:
            known["gen_ai.request.max_tokens"] = sampling.max_tokens
        if sampling.seed is not None:
            known["gen_ai.request.seed"] = sampling.seed
        if len(asked) > 1:
            known["gen_ai.request.choice.count"] = len(asked)
    return known


def outcome(call: Call) -> dict[str, Value]:
    """Return what is known when it is over."""
    known: dict[str, Value] = {
        "gen_ai.response.model": call.model.id,
        "gen_ai.usage.input_tokens": call.prompt_tokens,
        "gen_ai.usage.output_tokens": sum(len(request.tokens) for request in call.requests),
        "lmx.request_id": call.context.request_id,
    }
    cached = call.cached_tokens
    if cached:
        known["gen_ai.usage.cache_read.input_tokens"] = cached
    reasons = tuple(request.finish.name.lower() for request in call.requests if request.finish is not None)
    if reasons:
        known["gen_ai.response.finish_reasons"] = reasons
    first = [request.first_text_at for request in call.requests if request.first_text_at is not None]
    if first:
        known["gen_ai.response.time_to_first_chunk"] = round(min(first) - call.context.started, 6)
    crashes = sum(request.crashes for request in call.requests)
    if crashes:
        known["lmx.crashes"] = crashes
    return known


def error_of(call: Call) -> str:
    """Return the code of the error that a call ended with, "" if it did not."""
    return next((request.error.code for request in call.requests if request.error is not None), "")


def _operation(kind: Kind) -> str:
    return _OPERATIONS.get(kind, kind.name.lower())
