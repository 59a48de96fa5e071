"""What a client sees of a worker that answers, refuses, fails, dies or talks nonsense."""

import asyncio
import contextlib
import socket
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from protocol.config import GatewayConfig
from protocol.data import Accepted, Delta, Failed, Finish, Refused, Sampling, Step, Submit
from protocol.messages import encode
from protocol.states import ModelState
from tests.e2e.gateway_harness import (
    FAIL,
    PATIENCE_S,
    FakeWorker,
    Stack,
    chat_body,
    chunks,
    error_code,
    stack,
    text_of,
    until,
)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert error["request_id"] == answer.headers["x-request-id"]
    return error


async def test_a_request_reaches_the_worker_whole() -> None:
    async with stack(GatewayConfig(chat_timeout_s=60)) as lmx:
        worker = await lmx.start_worker()
        answering = asyncio.create_task(
            lmx.client.post(
                "/v1/chat/completions",
                json=chat_body(max_tokens=9, temperature=0, top_p=0.5, seed=3, stop="x", frobnicate=1, user="u"),
                headers={"x-request-id": "my-id_1.2"},
            )
        )
        submit = await worker.answer("Hel", "lo ☃", finish=Finish.LENGTH)
        answer = await answering
        assert submit.sampling == Sampling(9, 0.0, 0.5, 3, ("x",))
        assert [(m.role, m.content) for m in submit.messages] == [("user", "hello")]
        assert (submit.trace, submit.client, submit.incarnation) == ("my-id_1.2", "127.0.0.1", 1)
        assert 0 < submit.deadline_s <= 60
        body = answer.json()
        assert body["choices"][0]["message"] == {"content": "Hello ☃", "role": "assistant", "refusal": None}
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"] == {
            "prompt_tokens": 7,
            "completion_tokens": 2,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        assert answer.headers["x-request-id"] == "my-id_1.2"
        assert answer.headers["x-lmx-ignored"] == "frobnicate"
        # Written behind the answer.
        await until(lambda: any(e["event"] == "http_request" and e["method"] == "POST" for e in lmx.gateway.events()))
        logged = {e["event"]: e for e in lmx.gateway.events()}
        assert logged["inference_complete"]["completion_tokens"] == 2
        assert logged["http_request"]["request_id"] == "my-id_1.2"
        assert "hello" not in lmx.gateway.log.read_text().lower()


async def test_sixteen_streams_run_side_by_side() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        streams = [lmx.chat(stream=True, stream_options={"include_usage": True}) for _ in range(16)]
        rids = [(await worker.accept()).rid for _ in streams]
        assert len(set(rids)) == 16
        for step in range(20):
            last = step == 19
            deltas = [
                Delta(rid, f"{rid}:{step} ", [1], *((Finish.STOP, None) if last else (None, None))) for rid in rids
            ]
            await worker.send(Step(1, step, deltas))
        bodies = [(await stream).text for stream in streams]
        assert {text_of(body) for body in bodies} == {"".join(f"{rid}:{n} " for n in range(20)) for rid in rids}
        assert all(chunks(body)[-1] == "[DONE]" for body in bodies)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "status", "retry_after", "shown"),
    [
        ("server_busy", 429, "5", "server_busy"),
        ("context_length_exceeded", 400, None, "context_length_exceeded"),
        ("load_shedding", 503, "9", "load_shedding"),
        ("unheard_of", 500, None, "internal_error"),
    ],
)
async def test_refusals_are_clean_statuses(
    stream: bool, code: str, status: int, retry_after: str | None, shown: str
) -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        answering = lmx.chat(stream=stream)
        submit = await worker.receive(Submit)
        await worker.send(Refused(1, submit.rid, code, "words", "messages", 9 if code == "load_shedding" else None))
        answer = await answering
        assert answer.status_code == status
        assert answer.headers.get("retry-after") == retry_after
        error = error_of(answer)
        assert (error["code"], error["message"], error["param"]) == (shown, "words", "messages")


async def test_a_dying_worker_takes_down_its_own_requests_only() -> None:
    async with stack(FAIL) as lmx:
        sick, well = await lmx.start_worker("sick"), await lmx.start_worker("well")
        broken = [lmx.chat(model="sick", stream=True) for _ in range(4)]
        broken_rids = [(await sick.accept()).rid for _ in broken]
        waiting = lmx.chat(model="sick", stream=True)
        await sick.receive(Submit)
        whole = lmx.chat(model="sick")
        await sick.accept()
        healthy = lmx.chat(model="well", stream=True)
        rid = (await well.accept()).rid
        for broken_rid in broken_rids:
            await sick.step(broken_rid, "some")
        await well.step(rid, "all ")
        sick.die()
        for task in broken:
            answer = await task
            assert answer.status_code == 200
            assert "[DONE]" not in answer.text
            assert answer.text.count("event: error\n") == 1
            last = chunks(answer.text)[-1]["error"]
            assert (last["code"], last["request_id"]) == ("worker_crashed", answer.headers["x-request-id"])
        for task in (waiting, whole):
            answer = await task
            assert (answer.status_code, error_of(answer)["code"]) == (503, "worker_crashed")
            assert answer.headers["retry-after"] == "2"
        # The catalog still calls it ready: nobody has told the supervisor yet.
        refused = await lmx.chat(model="sick")
        assert (refused.status_code, error_of(refused)["code"]) == (503, "model_restarting")
        await well.step(rid, "of it", finish=Finish.STOP)
        assert text_of((await healthy).text) == "all of it"

        again = await lmx.start_worker("sick", 2)
        answering = lmx.chat(model="sick")
        await again.answer("back")
        assert (await answering).status_code == 200


async def test_a_broken_stream_closes_its_connection() -> None:
    async with stack(FAIL) as lmx:
        worker = await lmx.start_worker()
        reader, writer = await asyncio.open_connection("127.0.0.1", lmx.gateway.port)
        body = msgspec.json.encode(chat_body(stream=True))
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        await worker.accept()
        assert b"200 OK" in await reader.readuntil(b"\r\n")
        worker.die()
        async with asyncio.timeout(PATIENCE_S):
            rest = await reader.read()
        assert rest.endswith(b"\r\n0\r\n\r\n")
        assert b"event: error\ndata: {" in rest
        writer.close()


async def test_an_answer_that_fails_ends_typed() -> None:
    async with stack(FAIL) as lmx:
        worker = await lmx.start_worker()
        accepting = asyncio.create_task(worker.accept())
        async with lmx.client.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as streaming:
            rid, seen = (await accepting).rid, ""
            await worker.step(rid, "some")
            async for text in streaming.aiter_text():
                seen += text
                if text_of(seen) == "some":
                    await worker.send(Failed(1, rid, "insufficient_memory", "too little", retryable=True))
        assert "event: error\n" in seen
        assert chunks(seen)[-1]["error"]["code"] == "insufficient_memory"
        whole = lmx.chat()
        submit = await worker.accept()
        await worker.step(submit.rid, "some")
        await worker.send(Failed(1, submit.rid, "insufficient_memory", "too little"))
        answer = await whole
        assert (answer.status_code, error_of(answer)["code"]) == (503, "insufficient_memory")


async def test_a_replaced_incarnation_is_not_listened_to() -> None:
    async with stack(FAIL) as lmx:
        old = await lmx.start_worker()
        streaming = lmx.chat(stream=True)
        await old.accept()
        new = await lmx.start_worker("tiny", 2)
        assert error_code(await streaming) == "worker_crashed"
        answering = lmx.chat()
        await new.answer("new")
        assert (await answering).json()["choices"][0]["message"]["content"] == "new"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_told_to_the_worker(stream: bool) -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        for accept in (False, True):
            _, writer = await asyncio.open_connection("127.0.0.1", lmx.gateway.port)
            body = msgspec.json.encode(chat_body(stream=stream))
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            submit = await (worker.accept() if accept else worker.receive(Submit))
            if accept:
                await worker.step(submit.rid, "x")
            writer.close()
            await worker.aborted(submit.rid)
            # Too late, and harmless.
            await worker.step(submit.rid, "y")
        answering = lmx.chat()
        await worker.answer("fine")
        assert (await answering).status_code == 200
        events = [e["event"] for e in lmx.gateway.events()]
        assert events.count("inference_cancelled") == 2
        assert not {"protocol_error", "request_crashed", "library_log"} & set(events)


async def test_deadlines_end_requests_and_their_work() -> None:
    async with stack(GatewayConfig(chat_timeout_s=0.2)) as lmx:
        worker = await lmx.start_worker()
        whole = lmx.chat()
        first = await worker.accept()
        assert first.deadline_s <= 0.2
        await worker.aborted(first.rid)
        answer = await whole
        assert (answer.status_code, error_of(answer)["code"]) == (504, "timeout")
        streaming = lmx.chat(stream=True)
        second = await worker.accept()
        await worker.step(second.rid, "x")
        await worker.aborted(second.rid)
        assert error_code(await streaming) == "timeout"


async def test_silence_is_filled_with_comments() -> None:
    async with stack(GatewayConfig(keepalive_s=0.05)) as lmx:
        worker = await lmx.start_worker()
        accepting = asyncio.create_task(worker.accept())
        async with lmx.client.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as answer:
            rid, seen, said = (await accepting).rid, "", False
            async for text in answer.aiter_text():
                seen += text
                if seen.count(": keepalive\n\n") >= 3 and not said:  # several may come in one piece
                    said = True
                    await worker.step(rid, "late", finish=Finish.STOP)
        assert text_of(seen) == "late"
        assert seen.endswith("data: [DONE]\n\n")


async def test_a_slow_reader_is_merged_for_then_cut_off() -> None:
    async with stack(GatewayConfig(max_unsent_bytes=200_000)) as lmx:
        worker, other = await lmx.start_worker(), await lmx.start_worker("other")
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", lmx.gateway.port))
        body = msgspec.json.encode(chat_body(stream=True))
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        submit = await worker.accept()
        cut = asyncio.create_task(worker.aborted(submit.rid))
        before = rss(lmx)
        sent = 0
        while not cut.done():
            await worker.step(submit.rid, "x" * 10_000)
            sent += 10_000
            if sent % 1_000_000:
                await asyncio.sleep(0)
            else:  # only what the gateway has got round to says anything about what it keeps
                await lmx.client.get("/healthz")
        await cut
        # What the kernel's socket buffers hold, our bound, and no more.
        assert sent < 40_000_000
        assert rss(lmx) - before < 50 * 1024
        await until(lambda: "slow_client" in [e["event"] for e in lmx.gateway.events()])
        sock.settimeout(PATIENCE_S)
        received = await asyncio.to_thread(drain, sock)
        assert b"[DONE]" not in received
        answering = lmx.chat(model="other")
        await other.answer("fine")
        assert (await answering).status_code == 200


def drain(sock: socket.socket) -> bytes:
    """Read to the end, however it comes; return the last of it."""
    last = b""
    with sock, contextlib.suppress(ConnectionResetError):
        while data := sock.recv(1 << 20):
            last = data
    return last


def rss(lmx: Stack) -> int:
    """Return the gateway's resident memory in KiB."""
    return psutil.Process(lmx.gateway.process.pid).memory_info().rss // 1024


async def test_nonsense_is_dropped_and_too_much_of_it_ends_the_link() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        streaming = lmx.chat(stream=True)
        submit = await worker.accept()
        await worker.send(Accepted(99, submit.rid, 1))
        await worker.send(Step(99, 1, [Delta(submit.rid, "foreign", [1])]))
        await worker.send(Step(1, 1, [Delta(12345, "nobody's", [1])]))
        await worker.send(Failed(1, 12345, "timeout", ""))
        await worker.send_raw(b"\xc1 garbage")
        await worker.send_raw(encode(Step(1, 1, [])), b"second part")
        await worker.step(submit.rid, "mine", finish=Finish.STOP)
        body = (await streaming).text
        assert (text_of(body), chunks(body)[-1]) == ("mine", "[DONE]")

        answering = lmx.chat()
        await worker.accept()
        await worker.send_raw(b"")
        answer = await answering
        assert (answer.status_code, error_of(answer)["code"]) == (502, "protocol_error")
        errors = [e for e in lmx.gateway.events() if e["event"] == "protocol_error"]
        assert errors
        assert all(e["model"] == "tiny" for e in errors)


async def test_an_answer_out_of_turn_is_an_error_of_that_request() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        answering = lmx.chat()
        submit = await worker.receive(Submit)
        await worker.step(submit.rid, "not accepted yet")
        answer = await answering
        assert (answer.status_code, error_of(answer)["code"]) == (502, "protocol_error")
        await worker.aborted(submit.rid)


async def test_a_worker_that_closed_one_connection_is_met_again() -> None:
    """Cut off for bad frames, or out of descriptors for a moment: the same incarnation must not be lost for good."""
    async with stack() as lmx:
        worker = await lmx.start_worker()
        first = lmx.chat()
        await worker.accept()
        for _ in range(3):
            await worker.send_raw(b"bad")
        assert (await first).status_code == 502
        answer: httpx.Response | None = None

        async def ask() -> httpx.Response:
            while (got := await lmx.chat()).status_code == 503:
                pass
            return got

        asking = asyncio.create_task(ask())
        await worker.answer("again")
        answer = await asking
        assert answer.json()["choices"][0]["message"]["content"] == "again"


async def test_a_stopped_worker_does_not_stop_the_gateway() -> None:
    """A published endpoint that nobody binds, then one that is bound and never answers."""
    async with stack(FAIL) as lmx:
        ghost = FakeWorker(lmx.home, "ghost")
        ghost.die()
        lmx.supervisor.publish(ghost.catalog_model())
        await lmx.state("ghost", ModelState.READY)
        refused = await lmx.chat(model="ghost")
        assert (refused.status_code, error_of(refused)["code"]) == (503, "model_restarting")
        with socket.socket(socket.AF_UNIX) as silent:
            endpoint = str(lmx.home / "silent.sock")
            silent.bind(endpoint)
            silent.listen()
            lmx.supervisor.publish(ghost.catalog_model(id="silent", endpoint=endpoint))
            await lmx.state("silent", ModelState.READY)
            refused = await lmx.chat(model="silent")
            assert (refused.status_code, error_of(refused)["code"]) == (503, "model_restarting")


async def test_sixty_crashes_leak_nothing() -> None:
    async with stack(FAIL) as lmx:
        process = psutil.Process(lmx.gateway.process.pid)
        settled = 0
        for incarnation in range(1, 61):
            worker = await lmx.start_worker("tiny", incarnation)
            answering = lmx.chat(stream=True, seed=incarnation)  # the same one would be set aside
            await worker.accept()
            worker.die()
            await answering
            lmx.workers.clear()
            if incarnation == 10:
                settled = process.num_fds()
        # libzmq closes its descriptors in a thread of its own, a moment later.
        await until(lambda: process.num_fds() <= settled + 1)
