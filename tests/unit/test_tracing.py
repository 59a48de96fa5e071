"""Contexts are passed on as they came, spans say what they may, and without being asked nothing is imported."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from protocol.config import TracingConfig
from protocol.tracing import (
    LoggingTracer,
    NullTracer,
    OpenTelemetryTracer,
    make_tracer,
    parse_traceparent,
    trace_id_of,
    traced,
    tracing_problems,
)
from tests.logkit import logged

REPOSITORY = Path(__file__).resolve().parents[2]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CONTEXT = f"00-{TRACE}-{PARENT}-01"


@pytest.mark.parametrize(
    ("offered", "found"),
    [
        (CONTEXT, CONTEXT),
        (f"  {CONTEXT} ", CONTEXT),
        (f"cc-{TRACE}-{PARENT}-01-what-will-be", CONTEXT),  # of a later version
        (f"00-{TRACE}-{PARENT}-01-what", ""),
        (f"ff-{TRACE}-{PARENT}-01", ""),
        (f"00-{'0' * 32}-{PARENT}-01", ""),
        (f"00-{TRACE}-{'0' * 16}-01", ""),
        (CONTEXT.upper(), ""),
        (CONTEXT[:-1], ""),
        (f"00-{TRACE}-{PARENT}-01\n", CONTEXT),
        ("", ""),
        ("x" * 100_000, ""),
    ],
)
def test_a_context_is_taken_only_if_it_is_one(offered: str, found: str) -> None:
    assert parse_traceparent(offered.encode()) == found


def test_nobody_who_traces_nothing_imports_anything_and_contexts_pass_through() -> None:
    program = """
import sys, gateway.service, worker.io_thread, supervisor.daemon
from protocol.config import TracingConfig
from protocol.tracing import make_tracer
for spans in ("none", "log"):
    make_tracer(TracingConfig(spans=spans), "lmx-gateway")
print(*sorted({"opentelemetry", "requests", "google", "jwt", "cryptography", "prometheus_client"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert NullTracer().start("chat m", CONTEXT, {}).traceparent == CONTEXT
    assert NullTracer().start("chat m", "", {}).traceparent == ""
    assert (traced(CONTEXT), traced("")) == ({"trace_id": TRACE}, {})


def test_a_logged_span_has_its_parent_its_time_and_its_attributes() -> None:
    tracer = make_tracer(TracingConfig(spans="log"), "lmx-gateway")
    assert isinstance(tracer, LoggingTracer)
    with logged() as seen:
        outer = tracer.start("chat m", CONTEXT, {"gen_ai.request.model": "m"})
        inner = tracer.start("generate", outer.traceparent, {})
        inner.end({"gen_ai.usage.output_tokens": 3})
        outer.end({"gen_ai.response.finish_reasons": ("stop", "length")}, "timeout")
        tracer.start("chat m", "", {}).end({})
    inside, outside, alone = (line for line in seen if line["event"] == "span")
    assert inside["trace_id"] == outside["trace_id"] == TRACE != alone["trace_id"]
    assert (inside["parent_id"], outside["parent_id"], alone["parent_id"]) == (outside["span_id"], PARENT, "")
    assert (outside["gen_ai.response.finish_reasons"], outside["error.type"]) == ("stop, length", "timeout")
    assert inside["gen_ai.usage.output_tokens"] == 3
    assert inside["ms"] >= 0


def test_open_telemetry_gets_spans_under_the_clients_own() -> None:
    exporter = InMemorySpanExporter()
    tracer = OpenTelemetryTracer(TracingConfig(spans="otlp"), "lmx-gateway", exporter)
    span = tracer.start("chat m", CONTEXT, {"gen_ai.request.model": "m"})
    assert trace_id_of(span.traceparent) == TRACE
    assert span.traceparent != CONTEXT
    span.end({"gen_ai.usage.input_tokens": 7}, "worker_crashed")
    tracer.start("chat m", "", {}).end({})
    tracer.close()
    first, second = exporter.get_finished_spans()
    assert first.parent is not None
    assert (f"{first.context.trace_id:032x}", f"{first.parent.span_id:016x}") == (TRACE, PARENT)
    attributes = {"gen_ai.request.model": "m", "gen_ai.usage.input_tokens": 7, "error.type": "worker_crashed"}
    assert dict(first.attributes or {}) == attributes
    assert not first.status.is_ok
    assert second.parent is None
    assert first.resource.attributes["service.name"] == "lmx-gateway"


def test_what_the_client_does_not_sample_is_not_sampled() -> None:
    exporter = InMemorySpanExporter()
    tracer = OpenTelemetryTracer(TracingConfig(spans="otlp"), "lmx-gateway", exporter)
    span = tracer.start("chat m", CONTEXT[:-1] + "0", {})
    assert span.traceparent.endswith("-00")
    span.end({})
    tracer.close()
    assert exporter.get_finished_spans() == ()


def test_a_collector_that_is_away_costs_no_request_anything() -> None:
    class Stuck(SpanExporter):
        def export(self, spans: object) -> SpanExportResult:
            time.sleep(0.5)
            return SpanExportResult.FAILURE

    tracer = OpenTelemetryTracer(TracingConfig(spans="otlp"), "lmx-gateway", Stuck())
    began = time.thread_time()
    for _ in range(5000):  # more than are kept
        tracer.start("chat m", "", {}).end({})
    assert time.thread_time() - began < 5


def test_what_cannot_be_traced_is_a_problem_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracing_problems(TracingConfig()) == tracing_problems(TracingConfig(spans="otlp")) == []
    assert "localhost:4318/v1/traces" in tracing_problems(TracingConfig(endpoint="collector"))[0]
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert "lmx[otel]" in tracing_problems(TracingConfig(spans="otlp"))[0]
    assert tracing_problems(TracingConfig(spans="log")) == []


def test_a_gateway_that_cannot_trace_serves_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with logged() as seen:
        assert isinstance(make_tracer(TracingConfig(spans="otlp"), "lmx-gateway"), NullTracer)
    assert [line["event"] for line in seen] == ["tracing_unavailable"]
