"""No input is answered with a 5xx, none makes the gateway grow, and the next client is served."""

import asyncio
import contextlib
from collections import deque
from typing import Any

import msgspec
import psutil
import pytest

from protocol.config import GatewayConfig
from protocol.data import Submit
from tests.e2e.gateway_harness import FAIL, PATIENCE_S, Stack, chat_body, stack

POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
GOOD = msgspec.json.encode(chat_body())
_STREAMED = msgspec.json.encode(chat_body(stream=True))
STREAM = POST + b"content-length: %d\r\n\r\n" % len(_STREAMED) + _STREAMED

BODIES: list[tuple[bytes, int, str, str | None]] = [
    (b"", 400, "invalid_json", None),
    (b"{", 400, "invalid_json", None),
    (b"\xff\xfe\x00", 400, "invalid_json", None),
    (b'{"model":"tiny","messages":[{"role":"user","content":"\xc3"}]}', 400, "invalid_json", None),
    (b'{"model":"tiny","messages":[{"role":"user","content":"\\ud83d"}]}', 400, "invalid_json", None),
    (b"[" * 100_000, 400, "invalid_type", None),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400, "invalid_json", None),
    (b'{"model":"tiny","messages":[],"metadata":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "invalid_json", None),
    (b"[1, 2]", 400, "invalid_type", None),
    (b"{}", 400, "missing_field", "model"),
    (msgspec.json.encode(chat_body(messages=[])), 400, "invalid_value", "messages"),
    (
        msgspec.json.encode(chat_body(messages=[{"role": "elf", "content": ""}])),
        400,
        "invalid_value",
        "messages[0].role",
    ),
    (msgspec.json.encode(chat_body(temperature=-1)), 400, "invalid_value", "temperature"),
    (GOOD[:-1] + b',"max_tokens":1' + b"0" * 400 + b"}", 400, "invalid_value", "max_tokens"),
    (GOOD[:-1] + b',"temperature":1e400}', 400, "invalid_value", "temperature"),
    (GOOD[:-1] + b',"temperature":NaN}', 400, "invalid_json", None),
    (msgspec.json.encode(chat_body(tools=[{}])), 400, "missing_field", "tools[0].type"),
    (msgspec.json.encode(chat_body(model="../../etc/passwd\0")), 404, "model_not_found", "model"),
    (msgspec.json.encode(chat_body(model="x" * 100_000)), 404, "model_not_found", "model"),
]


async def exchange(lmx: Stack, *pieces: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """Write the pieces to a connection of their own; return status, headers and body of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", lmx.gateway.port)
    try:
        async with asyncio.timeout(PATIENCE_S):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.split(b"\r\n")
            headers = dict(line.split(b": ", 1) for line in lines[1:] if line)
            return int(lines[0].split()[1]), headers, await reader.readexactly(int(headers[b"content-length"]))
    finally:
        writer.close()


def memory(lmx: Stack) -> int:
    return psutil.Process(lmx.gateway.process.pid).memory_info().rss


async def still_serves(lmx: Stack) -> None:
    answering = lmx.chat()
    await lmx.workers[0].answer("fine")
    assert (await answering).status_code == 200


async def test_bad_bodies_are_4xx_that_name_the_field() -> None:
    async with stack() as lmx:
        await lmx.start_worker()
        for body, status, code, param in BODIES:
            answer = await lmx.client.post("/v1/chat/completions", content=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (status, code, param), body[:80]
            assert error.keys() == {"message", "type", "param", "code", "request_id"}
            assert error["request_id"] == answer.headers["x-request-id"]
            assert len(answer.content) < 1000
        await still_serves(lmx)
        assert not {"request_crashed", "library_log"} & {e["event"] for e in lmx.gateway.events()}


async def test_any_content_type_is_accepted() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        headers = {"content-type": "text/plain"}
        answering = asyncio.create_task(lmx.client.post("/v1/chat/completions", content=GOOD, headers=headers))
        await worker.answer("x")
        assert (await answering).status_code == 200


async def test_routes_and_methods() -> None:
    async with stack() as lmx:
        for method, path, status, code in [
            ("GET", "/v1/nowhere", 404, "not_found"),
            ("GET", "/", 404, "not_found"),
            ("GET", "/v1/models/%00%ff", 404, "model_not_found"),
            ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
            ("DELETE", "/v1/models/tiny", 405, "method_not_allowed"),
            ("POST", "/healthz", 405, "method_not_allowed"),
        ]:
            answer = await lmx.client.request(method, path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            if status == 405:
                assert answer.headers["allow"] == ("POST" if "chat" in path else "GET, HEAD")


async def test_problem_details_for_who_asks() -> None:
    async with stack() as lmx:
        headers = {"accept": "application/problem+json", "x-request-id": "abc"}
        answer = await lmx.client.post("/v1/chat/completions", content=b"{}", headers=headers)
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert (problem["status"], problem["code"], problem["param"]) == (400, "missing_field", "model")
        assert (problem["type"], problem["request_id"]) == ("urn:lmx:error:missing_field", "abc")


@pytest.mark.parametrize("offered", [b"bad id", b"x" * 129, b"a\xe9"])
async def test_unsafe_request_ids_are_replaced(offered: bytes) -> None:
    async with stack() as lmx:
        _, headers, _ = await exchange(
            lmx, b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx-request-id: " + offered + b"\r\n\r\n"
        )
        assert headers[b"x-request-id"].startswith(b"req_")
        assert len(headers[b"x-request-id"]) == 26


async def test_a_declared_size_is_refused_before_it_is_sent() -> None:
    async with stack() as lmx:
        await lmx.start_worker()
        status, headers, body = await exchange(lmx, POST + b"content-length: 107374182400\r\n\r\n" + b"x" * 1000)
        assert (status, headers[b"connection"]) == (413, b"close")
        assert msgspec.json.decode(body)["error"]["code"] == "body_too_large"
        assert b"x-request-id" in headers
        # A client that sends everything before it listens gets to read the answer all the same.
        answer = await lmx.client.post("/v1/chat/completions", content=b"x" * (20 * 1024 * 1024))
        assert answer.status_code == 413
        await still_serves(lmx)


async def test_a_chunked_bomb_leaves_memory_flat() -> None:
    async with stack(GatewayConfig(max_body_bytes=1024 * 1024)) as lmx:
        await lmx.start_worker()
        before = memory(lmx)
        reader, writer = await asyncio.open_connection("127.0.0.1", lmx.gateway.port)
        writer.write(POST + b"transfer-encoding: chunked\r\n\r\n")
        answer = asyncio.create_task(reader.readline())
        piece = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
        sent = 0
        try:
            async with asyncio.timeout(PATIENCE_S):
                while sent < 200:
                    writer.write(piece)
                    await writer.drain()
                    sent += 1
        except ConnectionError:
            pass
        # It stopped reading: a few times the limit, and what the kernel buffers.
        assert sent < 30
        assert b" 413 " in await answer
        writer.close()
        assert memory(lmx) - before < 20 * 1024 * 1024
        await still_serves(lmx)


async def test_the_largest_body_is_served() -> None:
    async with stack(GatewayConfig(max_body_bytes=1024 * 1024)) as lmx:
        worker = await lmx.start_worker()
        empty = len(msgspec.json.encode(chat_body(messages=[{"role": "user", "content": ""}])))
        size = 1024 * 1024 - empty
        answering = lmx.chat(messages=[{"role": "user", "content": "x" * size}])
        submit = await worker.answer("long")
        assert len(submit.messages[0].content) == size
        assert (await answering).status_code == 200
        assert (await lmx.chat(messages=[{"role": "user", "content": "x" * (size + 1)}])).status_code == 413


async def test_clients_that_leave_while_sending_make_no_noise() -> None:
    async with stack() as lmx:
        await lmx.start_worker()
        for _ in range(20):
            _, writer = await asyncio.open_connection("127.0.0.1", lmx.gateway.port)
            writer.write(POST + b"content-length: 1000\r\n\r\n" + GOOD)
            await writer.drain()
            writer.close()
        await still_serves(lmx)
        events = lmx.gateway.events()
        assert {e["level"] for e in events} == {"INFO"}
        assert not [e for e in events if e["event"] == "library_log"]


async def test_what_is_not_http_gets_an_envelope_too() -> None:
    async with stack() as lmx:
        await lmx.start_worker()
        for request in (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nbad header\r\n\r\n",
            b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
            POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            b"GET /healthz HTTP/1.1\r\n" + b"x: " + b"y" * 70_000,
            b"GET /" + b"y" * 70_000 + b" HTTP/1.1\r\n\r\n",
            POST + b"transfer-encoding: chunked\r\n\r\n0\r\nx: " + b"y" * 400_000,
            POST + b"transfer-encoding: chunked\r\n\r\n5;" + b"y" * 400_000,
        ):
            status, headers, body = await exchange(lmx, request)
            assert status == 400
            assert msgspec.json.decode(body)["error"]["request_id"].encode() == headers[b"x-request-id"]
        await still_serves(lmx)


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        reader, writer = await asyncio.open_connection("127.0.0.1", lmx.gateway.port)
        chat = POST + b"content-length: %d\r\n\r\n" % len(GOOD) + GOOD
        writer.write(chat + b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        await worker.answer("first")
        async with asyncio.timeout(PATIENCE_S):
            everything = await reader.read()
        assert everything.index(b"first") < everything.index(b'"status":"ok"')
        writer.close()


async def test_a_client_that_leaves_with_a_request_behind_its_stream_is_told_to_the_worker() -> None:
    async with stack(GatewayConfig(keepalive_s=300)) as lmx:
        worker = await lmx.start_worker()
        reader, writer = await asyncio.open_connection("127.0.0.1", lmx.gateway.port)
        writer.write(STREAM + STREAM)
        rid = (await worker.accept()).rid
        await worker.step(rid, "first")
        async with asyncio.timeout(PATIENCE_S):
            await reader.readuntil(b"first")
        writer.transport.abort()
        await worker.aborted(rid)
        await still_serves(lmx)
        assert not [line for line in lmx.gateway.events() if line["event"] == "request_crashed"]


async def test_nothing_is_written_into_a_stream_behind_which_nonsense_follows() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        reader, writer = await asyncio.open_connection("127.0.0.1", lmx.gateway.port)
        writer.write(STREAM)
        rid = (await worker.accept()).rid
        await worker.step(rid, "first")
        async with asyncio.timeout(PATIENCE_S):
            await reader.readuntil(b"first")
            writer.write(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\nnonsense\r\n\r\n")
            rest = b""
            with contextlib.suppress(ConnectionError):
                rest = await reader.read()
        assert b"HTTP/1.1" not in rest
        await worker.aborted(rid)
        writer.close()


async def test_a_broken_stream_closes_its_connection_though_a_request_waits_behind_it() -> None:
    async with stack(FAIL) as lmx:
        worker = await lmx.start_worker()
        reader, writer = await asyncio.open_connection("127.0.0.1", lmx.gateway.port)
        writer.write(STREAM + b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        await worker.step((await worker.accept()).rid, "first")
        async with asyncio.timeout(PATIENCE_S):
            await reader.readuntil(b"first")
            worker.die()
            rest = await reader.read()
        assert b"worker_crashed" in rest
        assert b"HTTP/1.1" not in rest, "no answer follows on this connection"
        writer.close()


async def test_other_protocols_offered_by_upgrade_are_declined() -> None:
    async with stack() as lmx:
        request = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
        status, _, _ = await exchange(lmx, request)
        assert status == 200


async def test_memory_is_flat_over_many_bad_requests() -> None:
    async with stack() as lmx:
        await lmx.start_worker()

        async def burst() -> None:
            bodies = [body for body, _, _, _ in BODIES] * 5
            await asyncio.gather(*(lmx.client.post("/v1/chat/completions", content=body) for body in bodies))

        await burst()
        before = memory(lmx)
        for _ in range(5):
            await burst()
        assert memory(lmx) - before < 10 * 1024 * 1024


async def test_an_unhandled_exception_is_a_500_that_says_nothing() -> None:
    """The boundary itself: no input is known that reaches it."""
    import secrets

    from gateway.middleware import ErrorBoundary, RequestIdMiddleware
    from gateway.numbers import Numbers
    from gateway.traffic import Traffic

    marker = secrets.token_hex(8)
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError(marker)

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"x-request-id", b"abc")], "state": {}}
    await RequestIdMiddleware(ErrorBoundary(app), Traffic(), Numbers())(scope, receive, send)
    assert sent[0]["status"] == 500
    body = msgspec.json.decode(sent[1]["body"])["error"]
    assert (body["code"], body["request_id"]) == ("internal_error", "abc")
    assert marker not in str(sent)


async def test_a_request_is_not_submitted_twice_when_its_body_comes_in_pieces() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        asking = asyncio.create_task(
            exchange(
                lmx, POST + b"content-length: %d\r\n\r\n" % len(GOOD), *(GOOD[i : i + 1] for i in range(len(GOOD)))
            )
        )
        submit = await worker.accept()
        assert isinstance(submit, Submit)
        asking.cancel()
        await worker.aborted(submit.rid)


async def test_too_slow_a_head_is_a_408() -> None:
    """Ten seconds of waiting are not spent here: the clock is called by hand."""
    import unittest.mock

    from gateway.server import HttpProtocol

    protocol = HttpProtocol.__new__(HttpProtocol)
    protocol.transport = unittest.mock.Mock(is_closing=lambda: False)
    protocol._open = deque()
    protocol._head_missing()
    (written,), _ = protocol.transport.write.call_args
    assert written.startswith(b"HTTP/1.1 408 ")
    assert msgspec.json.decode(written.split(b"\r\n\r\n")[1])["error"]["code"] == "request_timeout"
    protocol.transport.close.assert_called_once()


async def test_a_head_that_arrived_while_the_gateway_had_no_time_is_not_called_late() -> None:
    import unittest.mock

    from gateway.server import _HEAD_GRACE_S, HttpProtocol

    for arrives in (True, False):
        protocol = HttpProtocol.__new__(HttpProtocol)
        protocol.transport = unittest.mock.Mock(is_closing=lambda: False)
        protocol._open = deque()
        protocol.loop = asyncio.get_running_loop()
        protocol._head_late()
        if arrives:  # the loop reads sockets after its timers
            asyncio.get_running_loop().call_soon(protocol._stop_head_timer)
        await asyncio.sleep(3 * _HEAD_GRACE_S)
        assert protocol.transport.write.called is not arrives
