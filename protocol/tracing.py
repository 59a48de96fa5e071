"""Spans from the gateway to the worker, and the `traceparent` that ties them to the client's: W3C trace context.

The context is passed on in any case. Spans cost nothing unless `tracing.spans` asks for them, and OpenTelemetry (the
extra `lmx[otel]`) is imported only then. Names and attributes are OpenTelemetry's for generative AI. No span ever has
a prompt, an answer or a key.
"""

import importlib.util
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any, Final, Protocol

from protocol import __version__
from protocol.config import TracingConfig
from protocol.logs import event

#: Of version 00; what a later version appends is dropped with its last dash.
_TRACEPARENT: Final = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)
#: For the last spans of a process that ends, and for each export: nobody waits for a collector that is away.
_EXPORT_S: Final = 2
_MAX_SPANS: Final = 2048
Value = str | bool | int | float | tuple[str, ...]
Attributes = Mapping[str, Value]


def parse_traceparent(offered: bytes) -> str:
    """Return the context in a client's header, "" if there is none that is valid."""
    found = _TRACEPARENT.fullmatch(offered.strip()) if len(offered) <= 256 else None
    if found is None or (offered.strip().startswith(b"00") and found[4]):
        return ""
    return f"00-{found[1].decode()}-{found[2].decode()}-{found[3].decode()}"


def trace_id_of(traceparent: str) -> str:
    """Return the trace's id, 32 hexadecimal digits, of a valid context."""
    return traceparent[3:35]


def traced(traceparent: str) -> dict[str, str]:
    """Return the field that a log line of a traced request has beside the others."""
    return {"trace_id": trace_id_of(traceparent)} if traceparent else {}


class Span(Protocol):
    """One piece of work that takes time."""

    @property
    def traceparent(self) -> str:
        """The context for what is done on its behalf."""

    def end(self, attributes: Attributes, error: str = "") -> None:
        """It is over; `error` is the code of the one it ended with. Called once."""


class Tracer(Protocol):
    """Makes spans. None of it raises, none of it waits."""

    def start(self, name: str, parent: str, attributes: Attributes) -> Span:
        """Begin a span under the context `parent`, "" for a trace of its own."""

    def close(self) -> None:
        """Send what has not been sent, for a moment."""


class _NoSpan:
    def __init__(self, traceparent: str) -> None:
        self.traceparent = traceparent

    def end(self, attributes: Attributes, error: str = "") -> None:
        pass


class NullTracer:
    """Passes contexts on and keeps nothing."""

    def start(self, name: str, parent: str, attributes: Attributes) -> Span:  # noqa: ARG002 - the protocol's
        """Return a span that is nothing but its parent's context."""
        return _NoSpan(parent)

    def close(self) -> None:
        """Do nothing."""


class _LoggedSpan:
    def __init__(self, name: str, parent: str, attributes: Attributes) -> None:
        self._name = name
        self._parent_id = parent[36:52]
        self._attributes = dict(attributes)
        self._began = time.monotonic()
        trace_id = trace_id_of(parent) if parent else secrets.token_hex(16)
        self._span_id = secrets.token_hex(8)
        self.traceparent = f"00-{trace_id}-{self._span_id}-{parent[53:] or '01'}"

    def end(self, attributes: Attributes, error: str = "") -> None:
        known = self._attributes | dict(attributes) | ({"error.type": error} if error else {})
        plain: dict[str, Any] = {k: ", ".join(v) if isinstance(v, tuple) else v for k, v in known.items()}
        event(
            "span",
            name=self._name,
            trace_id=trace_id_of(self.traceparent),
            span_id=self._span_id,
            parent_id=self._parent_id,
            ms=round((time.monotonic() - self._began) * 1000, 1),
            **plain,
        )


class LoggingTracer:
    """Writes each span into the log: to see what there is without a collector."""

    def start(self, name: str, parent: str, attributes: Attributes) -> Span:
        """Begin a span."""
        return _LoggedSpan(name, parent, attributes)

    def close(self) -> None:
        """Do nothing: a line is written when its span ends."""


class _OpenTelemetrySpan:
    def __init__(self, span: Any, failed: Any) -> None:
        self._span = span
        self._failed = failed
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"

    def end(self, attributes: Attributes, error: str = "") -> None:
        self._span.set_attributes(dict(attributes))
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(self._failed)
        self._span.end()


class OpenTelemetryTracer:
    """Hands spans to OpenTelemetry's SDK, which sends them in the background and drops what it cannot keep.

    Needs `lmx[otel]`: raises `ImportError`. `exporter` is one of the SDK's; without it, OTLP over HTTP.
    """

    def __init__(self, config: TracingConfig, service: str, exporter: Any = None) -> None:
        from opentelemetry import trace  # noqa: PLC0415 - the extra
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased  # noqa: PLC0415

        if exporter is None:
            exporter = OTLPSpanExporter(endpoint=config.endpoint or None, timeout=_EXPORT_S)
        # A provider of our own: what other libraries of the process do with the global one is their business.
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service, "service.version": __version__}),
            sampler=ParentBased(TraceIdRatioBased(config.sample)),
            shutdown_on_exit=False,
        )
        processor = BatchSpanProcessor(exporter, max_queue_size=_MAX_SPANS)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("lmx", __version__)
        self._trace = trace
        self._failed = trace.Status(trace.StatusCode.ERROR)
        self._kind = trace.SpanKind.SERVER if service.endswith("gateway") else trace.SpanKind.INTERNAL

    def start(self, name: str, parent: str, attributes: Attributes) -> Span:
        """Begin a span."""
        span = self._tracer.start_span(name, self._context(parent), kind=self._kind, attributes=dict(attributes))
        return _OpenTelemetrySpan(span, self._failed)

    def close(self) -> None:
        """Send the rest."""
        self._provider.force_flush(_EXPORT_S * 1000)

    def _context(self, parent: str) -> Any:
        trace = self._trace
        if not parent:
            return None
        flags = trace.TraceFlags(int(parent[53:], 16))
        trace_id, span_id = int(trace_id_of(parent), 16), int(parent[36:52], 16)
        known = trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=flags)
        return trace.set_span_in_context(trace.NonRecordingSpan(known))


def make_tracer(config: TracingConfig, service: str) -> Tracer:
    """Return what the configuration asks for; where that cannot be had, nothing is traced, and the log says so."""
    if config.spans == "log":
        return LoggingTracer()
    if config.spans == "otlp":
        try:
            return OpenTelemetryTracer(config, service)
        except ImportError as error:
            event("tracing_unavailable", level="ERROR", module=error.name)
    return NullTracer()


def tracing_problems(config: TracingConfig) -> list[str]:
    """Return what keeps this configuration from being traced as it says, in words."""
    if config.spans == "otlp" and importlib.util.find_spec("opentelemetry") is None:
        return ['tracing.spans = "otlp" needs the extra: pip install "lmx[otel]"']
    if config.endpoint and not re.match(r"https?://[^/\s]+", config.endpoint):
        return ["tracing.endpoint is no address: write it as http://localhost:4318/v1/traces"]
    return []
