"""The audit of a real gateway: a row for every fate of a request, pages, and live."""

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Origin, Subprotocol

from gateway.audit_file import AuditFile
from protocol.audit import AuditReader, AuditRow, Filter
from protocol.config import GatewayConfig, LimitsConfig, SecurityConfig
from protocol.data import Failed, Submit
from protocol.keys import KeyFile, KeyRecord, digest_of, new_key
from tests.e2e.gateway_harness import PATIENCE_S, Stack, chat_body, least, stack

ADMIN_KEY = "an-admin-key-of-the-tests"
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
CHAT = "/v1/chat/completions"


@asynccontextmanager
async def audited(folder: Path, config: GatewayConfig | None = None, **door: Any) -> AsyncIterator[Stack]:
    door = {"audit_file": str(folder / "audit.db"), "admin_digest": digest_of(ADMIN_KEY.encode()).hex(), **door}
    async with stack(config, **door) as made:
        yield made


async def page(lmx: Stack, **query: Any) -> list[dict[str, Any]]:
    answer = await lmx.client.get("/admin/audit", params=query, headers=ADMIN)
    if answer.status_code == 503:  # the file is being put aside
        assert answer.json()["code"] == "audit_unavailable"
        return []
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["data"]
    return rows


async def row_of(lmx: Stack, request_id: str) -> dict[str, Any]:
    """Wait for the row of a request: it is written after the answer."""
    async with asyncio.timeout(PATIENCE_S):
        while not (rows := await page(lmx, request_id=request_id)):  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.02)
    (row,) = rows
    return row


def named(request_id: str, **more: str) -> dict[str, str]:
    return {"x-request-id": request_id, **more}


async def test_every_fate_of_a_request_is_a_row(tmp_path: Path) -> None:
    key = new_key()
    KeyFile(tmp_path / "keys").write((KeyRecord("k1", "bot", digest_of(key.encode()).hex(), 0.0, priority=3),))
    config = GatewayConfig(completion_timeout_s=3.0, on_crash="fail")  # time enough to accept before it is over
    async with audited(tmp_path, config, keys_file=str(tmp_path / "keys")) as lmx:
        worker = await lmx.start_worker(incarnation=4)

        def ask(name: str, *, stream: bool = False, **headers: str) -> asyncio.Task[httpx.Response]:
            body = chat_body(stream=stream)
            return asyncio.create_task(lmx.client.post(CHAT, json=body, headers=named(name, **headers)))

        good = ask("good", **{"authorization": f"Bearer {key}", "x-client-id": "mailer"})
        await worker.answer("one", " two")
        assert (await good).status_code == 200
        row = await row_of(lmx, "good")
        expected = {
            "status": "success", "http_status": 200, "endpoint": "/v1/chat/completions", "model": "tiny",
            "backend_type": "local", "incarnation": 4, "key_id": "k1", "client": "key:k1", "client_id": "mailer",
            "priority": 3, "stream": False, "prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9,
            "cached_tokens": 3, "error_type": None, "count": 1,
        }  # fmt: skip
        assert {name: row[name] for name in expected} == expected
        assert abs(row["timestamp"] - time.time()) < 60
        assert 0 < row["ttft_ms"] <= row["duration_ms"]

        failing = ask("failed", stream=True)
        submit = await worker.receive(Submit)
        await worker.send(Failed(4, submit.rid, "context_length_exceeded", "too long"))
        assert (await failing).status_code == 400
        assert (await row_of(lmx, "failed"))["error_type"] == "context_length_exceeded"

        prompt = {"model": "tiny", "prompt": "hello"}
        late = asyncio.create_task(lmx.client.post("/v1/completions", json=prompt, headers=named("late")))
        submit = await worker.accept()
        assert (await late).status_code == 504
        await worker.aborted(submit.rid)
        row = await row_of(lmx, "late")
        assert (row["status"], row["error_type"], row["prompt_tokens"]) == ("timeout", "timeout", 7)

        leaving = ask("left")
        submit = await worker.accept()
        leaving.cancel()
        await worker.aborted(submit.rid)
        row = await row_of(lmx, "left")
        assert (row["status"], row["http_status"], row["error_type"]) == ("cancelled", 499, None)

        accepting = asyncio.create_task(worker.accept())
        async with lmx.client.stream("POST", CHAT, json=chat_body(stream=True), headers=named("crashed")) as broken:
            await worker.step((await accepting).rid, "begun")
            lines: list[str] = []
            async for line in broken.aiter_lines():
                lines.append(line)
                if "begun" in line:
                    worker.die()
        assert "worker_crashed" in "".join(lines)
        row = await row_of(lmx, "crashed")
        assert (row["status"], row["http_status"], row["error_type"]) == ("error", 200, "worker_crashed")

        for name, content, headers, code, status in (
            ("json", b"{", {}, "invalid_json", 400),
            ("model", b'{"model":"MARKER","messages":[{"role":"user","content":"x"}]}', {}, "model_not_found", 404),
            ("stranger", b"{}", {"authorization": "Bearer " + new_key()}, "invalid_api_key", 401),
        ):
            answer = await lmx.client.post(CHAT, content=content, headers=named(name, **headers))
            assert answer.status_code == status
            row = await row_of(lmx, name)
            assert (row["status"], row["error_type"], row["http_status"]) == ("error", code, status)
            assert (row["model"], row["endpoint"], row["client"]) == (None, "/v1/chat/completions", "127.0.0.1")
        await lmx.client.get("/v1/SECRET-PATH", headers=named("route"))
        assert (await row_of(lmx, "route"))["endpoint"] == "unmatched"
        await lmx.client.get("/admin/audit", headers=named("admin"))
        row = await row_of(lmx, "admin")
        assert (row["endpoint"], row["http_status"]) == ("/admin/audit", 401)
        await lmx.client.get("/v1/models", headers=named("models"))
        await lmx.client.get("/healthz", headers=named("health"))
        assert await page(lmx, request_id="models") == await page(lmx, request_id="health") == []
        routes = {event["route"] for event in lmx.gateway.events() if event["event"] == "http_request"}
        assert "/healthz" not in routes
        assert {"/models", "/chat/completions", "unmatched"} <= routes
    everything = b"".join(file.read_bytes() for file in tmp_path.glob("audit.db*"))
    assert not [word for word in (b"MARKER", b"SECRET-PATH", key.encode(), b"begun", b"hello") if word in everything]


async def test_a_hundred_thousand_rows_are_paged_in_time(tmp_path: Path) -> None:
    path, now = tmp_path / "audit.db", time.time()
    fill(path, 0)
    with sqlite3.connect(path) as connection:
        connection.execute(
            "INSERT INTO audit_logs (request_id, timestamp, endpoint, status, http_status, duration_ms, model, client)"
            "WITH RECURSIVE n(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM n WHERE n < 99999)"
            "SELECT 'r' || n, ? + n, '/v1/chat/completions', 'success', 200, 1.0, 'm' || n % 7, 'c' || n % 50 FROM n",
            (now - 100_000,),
        )
    connection.close()
    async with audited(tmp_path) as lmx:
        for query in (
            {},
            {"model": "m3"},
            {"status": "error"},
            {"client": "c9", "since": now - 50_000},
            {"limit": 1000},
        ):

            async def read(query: dict[str, Any] = query) -> float:
                began = time.perf_counter()
                await page(lmx, **query)
                return time.perf_counter() - began

            assert await least(read, 0.2, tries=20) < 0.2, query
        seen: list[str] = []
        before = None
        while len(seen) < 2500:
            query = {"limit": 1000, **({} if before is None else {"before": before})}
            answer = (await lmx.client.get("/admin/audit", params=query, headers=ADMIN)).json()
            seen += [row["request_id"] for row in answer["data"]]
            before = answer["next"]
        assert seen == [f"r{99_999 - n}" for n in range(3000)]
        last = (await lmx.client.get("/admin/audit", params={"request_id": "r5"}, headers=ADMIN)).json()
        assert ([row["request_id"] for row in last["data"]], last["next"]) == (["r5"], None)


async def test_a_wrong_parameter_is_a_clear_400(tmp_path: Path) -> None:
    wrong = (
        "limit=0",
        "limit=x",
        "limit=9999",
        "limit=1.5",
        "limit=1_0",
        "limit=%D9%A3",
        "before=1e3",
        "before=-1",
        "status=good",
        "since=nan",
        "other=1",
        "model=" + 300 * "x",
    )
    async with audited(tmp_path) as lmx:
        for query in wrong:
            answer = await lmx.client.get(f"/admin/audit?{query}", headers=ADMIN)
            assert (answer.status_code, answer.json()["code"]) == (400, "invalid_value"), query


async def test_a_broken_or_locked_file_stops_no_request(tmp_path: Path) -> None:
    path = tmp_path / "audit.db"
    path.write_bytes(b"not a database at all" * 500)
    async with audited(tmp_path) as lmx:
        worker = await lmx.start_worker()
        for number in range(3):
            asking = asyncio.create_task(lmx.client.post(CHAT, json=chat_body(), headers=named(f"r{number}")))
            await worker.answer("hello")
            assert (await asking).status_code == 200
        await row_of(lmx, "r2")
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        asking = asyncio.create_task(lmx.client.post(CHAT, json=chat_body(), headers=named("locked")))
        await worker.answer("hello")
        assert (await asking).status_code == 200
        other.execute("ROLLBACK")
        other.close()
        await row_of(lmx, "locked")
        events = [event["event"] for event in lmx.gateway.events()]
        assert "audit_file_set_aside" in events
    assert len(list(tmp_path.glob("audit.db.bad-*"))) == 1


# -- live ---------------------------------------------------------------------------------------------------------


def listening(lmx: Stack, **headers: str) -> connect:
    url = f"ws://127.0.0.1:{lmx.gateway.port}/ws/audit-logs"
    return connect(url, additional_headers={**ADMIN, **headers}, proxy=None)


async def heard(socket: ClientConnection, count: int) -> list[str]:
    async with asyncio.timeout(PATIENCE_S):
        found: list[str] = []
        while len(found) < count:
            row = json.loads(await socket.recv())
            if row["endpoint"] != "/ws/audit-logs":  # that somebody else has hung up
                found.append(row["request_id"])
        return found


async def make_rows(lmx: Stack, count: int, name: str) -> None:
    for number in range(count):
        answer = await lmx.client.post("/admin/nothing", headers={**ADMIN, **named(f"{name}{number}")})
        assert answer.status_code == 404


def fill(path: Path, count: int) -> None:
    file = AuditFile(path)
    file.append([AuditRow(f"old{n}", time.time(), CHAT, "success", 200, 1.0) for n in range(count)])
    file.close()


async def test_who_connects_gets_the_last_hundred_and_then_each(tmp_path: Path) -> None:
    fill(tmp_path / "audit.db", 120)
    async with audited(tmp_path) as lmx:
        async with listening(lmx) as first, listening(lmx) as second:
            assert await heard(first, 100) == [f"old{n}" for n in range(20, 120)]
            await heard(second, 100)
            await make_rows(lmx, 2, "live")
            assert await heard(first, 2) == await heard(second, 2) == ["live0", "live1"]
            second.transport.abort()  # without a word
            await make_rows(lmx, 3, "more")
            assert await heard(first, 3) == ["more0", "more1", "more2"]
        ended: list[int] = []
        async with asyncio.timeout(PATIENCE_S):
            while len(ended) < 2:
                rows = await page(lmx, client="admin")
                ended = [row["http_status"] for row in rows if row["endpoint"] == "/ws/audit-logs"]
        assert ended == [101, 101]


async def test_only_administrators_and_no_foreign_page_may_listen(tmp_path: Path) -> None:
    async with audited(tmp_path) as lmx:
        own = f"127.0.0.1:{lmx.gateway.port}"
        for headers in (
            {"authorization": "Bearer wrong"},
            {"authorization": ""},
            {"origin": "https://attacker.example"},
            {"origin": "null"},
            {"host": "attacker.example"},
        ):
            with pytest.raises(InvalidStatus) as refused:
                async with listening(lmx, **headers):
                    pass
            assert refused.value.response.status_code == 403
        async with listening(lmx, origin=f"http://{own}"):
            pass
        # As a web page has to: its key among the protocols.
        for key, allowed in ((ADMIN_KEY, True), ("wrong", False)):
            protocols = [Subprotocol("lmx.audit"), Subprotocol(f"lmx-key.{key}")]
            page_of = connect(
                f"ws://{own}/ws/audit-logs", subprotocols=protocols, proxy=None, origin=Origin(f"http://{own}")
            )
            if allowed:
                async with page_of as socket:
                    assert socket.subprotocol == "lmx.audit"
            else:
                with pytest.raises(InvalidStatus):
                    await page_of
        # But not for anything that is no WebSocket.
        offered = {"sec-websocket-protocol": f"lmx-key.{ADMIN_KEY}"}
        assert (await lmx.client.get("/admin/audit", headers=offered)).status_code == 401


async def test_a_listener_is_not_taken_for_a_request_that_is_about_to_come(tmp_path: Path) -> None:
    """Workers wait some milliseconds for requests that the gateway has read already."""
    fill(tmp_path / "audit.db", 1)
    async with audited(tmp_path) as lmx, listening(lmx) as socket:
        await heard(socket, 1)
        worker = await lmx.start_worker()
        answering = asyncio.create_task(worker.answer("hello"))
        assert (await lmx.client.post(CHAT, json=chat_body())).status_code == 200
        assert (await answering).coming == 0


async def test_a_gateway_that_ends_says_so(tmp_path: Path) -> None:
    fill(tmp_path / "audit.db", 1)
    async with audited(tmp_path) as lmx, listening(lmx) as socket:
        await heard(socket, 1)
        lmx.gateway.process.terminate()
        with pytest.raises(ConnectionClosed) as closed:
            async with asyncio.timeout(PATIENCE_S):
                await socket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
        assert await lmx.gateway.exit_code() == 0


async def test_the_same_comes_as_server_sent_events(tmp_path: Path) -> None:
    fill(tmp_path / "audit.db", 3)
    async with audited(tmp_path) as lmx:
        async with lmx.client.stream("GET", "/admin/audit/stream", headers=ADMIN) as stream:
            lines = stream.aiter_lines()

            async def next_id() -> str:
                async with asyncio.timeout(PATIENCE_S):
                    async for line in lines:
                        if line.startswith("data:"):
                            return str(json.loads(line.removeprefix("data:"))["request_id"])
                raise AssertionError

            assert [await next_id() for _ in range(3)] == ["old0", "old1", "old2"]
            await make_rows(lmx, 1, "live")
            assert await next_id() == "live0"
        assert (await lmx.client.get("/admin/audit/stream")).status_code == 401


async def test_a_flood_of_refusals_fills_nothing(tmp_path: Path) -> None:
    door = {"security": SecurityConfig(profile="lan"), "limits": LimitsConfig(inference_per_minute=5)}
    async with audited(tmp_path, **door) as lmx:
        answers = [await lmx.client.post(CHAT, content=b"{", headers=named(f"f{n}")) for n in range(120)]
        assert {answer.status_code for answer in answers} == {400, 429}
        lmx.gateway.process.terminate()
        assert await lmx.gateway.exit_code() == 0
    with AuditReader(tmp_path / "audit.db") as reader:
        rows = reader.page(Filter(), limit=1000)
    assert sum(row.count for row in rows) == 120
    assert len(rows) <= 40  # 26, unless the machine is so slow that a minute has passed
