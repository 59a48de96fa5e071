"""A trace goes from the client through the gateway into the worker and to a collector."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from protocol.data import Finish
from tests.e2e.gateway_harness import chat_body, stack, until
from tests.harness import Lmx, chat, deadline

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CONTEXT = f"00-{TRACE}-{PARENT}-01"
MARKER = "a marker that no span may have"


class Collector:
    """Takes spans over HTTP."""

    def __init__(self) -> None:
        self.spans: dict[str, Any] = {}
        self.bytes = b""
        self.news = threading.Condition()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.take(body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, body: bytes) -> None:
        sent = ExportTraceServiceRequest.FromString(body)
        with self.news:
            self.bytes += body
            for resource in sent.resource_spans:
                for scope in resource.scope_spans:
                    self.spans |= {span.name: span for span in scope.spans}
            self.news.notify_all()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.shutdown()
    made.server.server_close()


def value(span: Any, key: str) -> Any:
    (found,) = (attribute.value for attribute in span.attributes if attribute.key == key)
    return getattr(found, found.WhichOneof("value"))


def test_spans_of_both_processes_reach_a_collector_under_the_clients_trace(
    new_lmx: Callable[..., Lmx], tiny_model: Path, collector: Collector
) -> None:
    lmx = new_lmx(
        LMX_WORKER__MODULE="tests.fault",
        LMX_TRACING__SPANS="otlp",
        LMX_TRACING__ENDPOINT=f"http://127.0.0.1:{collector.server.server_port}/v1/traces",
        OTEL_BSP_SCHEDULE_DELAY="100",
    ).start()
    lmx.load(tiny_model, "alpha")
    body = chat("alpha", max_tokens=4, stream=False, text=MARKER)
    answer = httpx.post(f"{lmx.url}/v1/chat/completions", json=body, headers={"traceparent": CONTEXT}, timeout=60)
    assert answer.status_code == 200
    with collector.news:
        assert collector.news.wait_for(lambda: {"chat alpha", "generate"} <= collector.spans.keys(), 60), lmx.tail()
    outer, inner = collector.spans["chat alpha"], collector.spans["generate"]
    assert outer.trace_id.hex() == inner.trace_id.hex() == TRACE
    assert (outer.parent_span_id.hex(), inner.parent_span_id) == (PARENT, outer.span_id)
    assert answer.headers["traceparent"] == f"00-{TRACE}-{outer.span_id.hex()}-01"
    usage = answer.json()["usage"]
    assert value(outer, "gen_ai.request.model") == "alpha"
    assert value(outer, "gen_ai.operation.name") == "chat"
    assert value(outer, "gen_ai.usage.input_tokens") == usage["prompt_tokens"]
    assert value(outer, "gen_ai.usage.output_tokens") == value(inner, "gen_ai.usage.output_tokens") == 4
    text = answer.json()["choices"][0]["message"]["content"]
    assert MARKER.encode() not in collector.bytes
    assert text.encode() not in collector.bytes
    for _ in deadline(20):  # a line may come after its span
        logs = [file.read_text() for file in (lmx.home / "logs").glob("*.log")]
        if sum(f'"trace_id":"{TRACE}"' in log for log in logs) == 2:  # the gateway's and the worker's
            break
    else:
        raise AssertionError(lmx.tail())
    assert not any(MARKER in log for log in logs)


async def test_without_tracing_a_context_goes_to_the_worker_the_response_and_the_log_unchanged() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        for offered, passed in ((CONTEXT, CONTEXT), ("00-nonsense", ""), ("", "")):
            headers = {"traceparent": offered} if offered else {}
            asking = lmx.client.build_request("POST", "/v1/chat/completions", json=chat_body(), headers=headers)
            sending = asyncio.create_task(lmx.client.send(asking))
            submit = await worker.accept()
            assert submit.traceparent == passed
            await worker.step(submit.rid, "x", finish=Finish.STOP)
            answer = await sending
            assert answer.headers.get("traceparent", "") == passed
        await until(lambda: len([e for e in lmx.gateway.events() if e["event"] == "inference_complete"]) == 3)
        lines = [e for e in lmx.gateway.events() if e["event"] in {"inference_complete", "http_request"}]
        of_trace = [line["event"] for line in lines if line.get("trace_id") == TRACE]
        assert of_trace == ["inference_complete", "http_request"]
        assert not any("trace_id" in line for line in lines if line.get("trace_id") != TRACE)
