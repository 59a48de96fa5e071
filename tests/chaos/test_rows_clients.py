"""Rows 72 to 84 of the failure matrix: clients that leave, read slowly, send slowly, send too much, pry."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from gateway.body import BODY_TIMEOUT_S
from gateway.server import HEAD_TIMEOUT_S
from gateway.stream import WRITE_STALL_S
from tests.chaos.clients import OTHER
from tests.chaos.figures import Figure
from tests.chaos.scene import Stage
from tests.chaos.scene import logged as events_in
from tests.chaos.test_rows_gateway import (
    answers,
    ask,
    event_since,
    events_since,
    gateway_of,
    idle,
    load,
    patched,
    pids,
    stage_of,
    took,
    undisturbed,
)
from tests.fault.pipe import Pipe
from tests.fault.plan import FaultPlan
from tests.harness import chat, deadline

SLOW = "slow"
#: Steps of the slow model; a slot is free within one of them, told within a heartbeat.
STEP_S, HEARTBEAT_S = 0.25, 0.2
PATIENCE_S = 30.0
#: Nobody could have ended by itself by then.
SOON_S = 20.0
#: The kernel keeps megabytes for a reader that does not read; here it keeps little.
SMALL_BUFFERS = """
import socket
import gateway.server
real = gateway.server.HttpProtocol.connection_made
def connection_made(self, transport):
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    real(self, transport)
gateway.server.HttpProtocol.connection_made = connection_made
"""
#: Deadlines of heads and bodies are not settings and are scaled down here. The time limit on writing is as good as
#: removed: the bound on what waits for a slow reader has to do without it. Files the gateway opens are written down.
GATEWAY_PATCH = (
    SMALL_BUFFERS
    + """
import os, sys
import gateway.body, gateway.stream
gateway.stream.WRITE_STALL_S = 3600.0
gateway.server.HEAD_TIMEOUT_S = 1.5
gateway.body.BODY_TIMEOUT_S = 1.5
opened = os.open(f"{HERE}/opened", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def note(name, arguments):
    if name in ("open", "os.listdir", "os.scandir", "os.chdir", "os.rename", "os.remove", "import"):
        os.write(opened, f"{name} {arguments[0]!r}\\n".encode("utf-8", "backslashreplace"))
sys.addaudithook(note)
"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("site") / "site"


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipe]:
    """Lets the stepped model do its steps."""
    with Pipe(tmp_path_factory.mktemp("steps") / "pipe") as pipe:
        yield pipe


@pytest.fixture(scope="module")
def stage(tiny_model: Path, site: Path, steps: Pipe) -> Iterator[Stage]:
    settings = {"LMX_MODELS__QUEUE_DEPTH": "400", "LMX_GATEWAY__MAX_UNSENT_BYTES": "16384"}
    with stage_of(tiny_model, **settings, **patched(site, gateway=GATEWAY_PATCH)) as made:
        plans = [
            FaultPlan(models=(SLOW,), tokens_per_s=1 / STEP_S, max_model_len=100_000),
            FaultPlan(models=("fast",), tokens_per_s=1500, max_model_len=100_000),
            FaultPlan(models=("stepped",), step_pipe=str(steps.file), max_model_len=100_000),
        ]
        made.plans(*plans)
        load(made, SLOW, "fast", "stepped")
        yield made


@pytest.fixture(autouse=True)
def _nothing_is_replaced(stage: Stage) -> Iterator[None]:
    before = (pids(stage.lmx), gateway_of(stage.lmx)["pid"])
    yield
    assert (pids(stage.lmx), gateway_of(stage.lmx)["pid"]) == before, "a client ended a process"


def address(stage: Stage) -> tuple[str, int]:
    url = httpx.URL(stage.lmx.url)
    return str(url.host), int(url.port or 0)


def posted(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(data) + data


def logged(stage: Stage, name: str) -> int:
    return (stage.lmx.home / "logs" / "gateway.log").read_text().count(f'"event":"{name}"')


# -- 72 -----------------------------------------------------------------------------------------------------------


async def connected(where: tuple[str, int], request: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(*where)
    writer.write(request)
    await writer.drain()
    return reader, writer


async def running(stage: Stage, running: int, waiting: int, model: str = SLOW) -> None:
    """Wait until a model's worker says that it has so many requests."""

    def there(document: dict[str, Any]) -> bool:
        entry = next(m for m in document["models"] if m["id"] == model)
        return bool((entry["running"], entry["waiting"]) == (running, waiting))

    await asyncio.to_thread(stage.lmx.wait_status, there, PATIENCE_S)


@pytest.mark.parametrize("stream", [True, False])
async def test_row_72_disconnect_in_queue_and_decode(stage: Stage, figure: Figure, stream: bool) -> None:
    where = address(stage)
    long = posted(chat(SLOW, max_tokens=5000, stream=stream, text="[[tokens 5000]]"))
    cancelled = logged(stage, "inference_cancelled")
    with undisturbed(stage.lmx):
        decoding = [await connected(where, long) for _ in range(32)]
        await running(stage, 32, 0)
        queued = [await connected(where, long) for _ in range(200)]
        await running(stage, 32, 200)
        left_at = time.monotonic()
        for _, writer in queued:
            writer.close()
        await running(stage, 32, 0)
        figure("row 72", "200 in the queue gone", time.monotonic() - left_at, target=STEP_S + HEARTBEAT_S)
        assert time.monotonic() - left_at < SOON_S
        if stream:
            async with asyncio.timeout(PATIENCE_S):
                for reader, _ in decoding:
                    await reader.readuntil(b"tok0")
        left_at = time.monotonic()
        for _, writer in decoding:
            writer.close()
        await running(stage, 0, 0)
        figure("row 72", "32 while decoding gone", time.monotonic() - left_at, target=STEP_S + HEARTBEAT_S)
        assert time.monotonic() - left_at < SOON_S
        if stream:  # the other phases' 200: seven rounds of all slots
            for _ in range(6):
                crowd = [await connected(where, long) for _ in range(32)]
                async with asyncio.timeout(PATIENCE_S):
                    for reader, _ in crowd:
                        await reader.readuntil(b"tok0")
                for _, writer in crowd:
                    writer.close()
            await running(stage, 0, 0)
    for _ in deadline(PATIENCE_S):
        if logged(stage, "inference_cancelled") - cancelled >= (32 * 7 if stream else 32) + 200:
            break
    else:
        raise AssertionError("not every client that left was noticed")
    whole = [ask(stage.lmx.url, SLOW, max_tokens=1) for _ in range(32)]
    assert all(call.wait().whole for call in whole), "a slot is missing"


async def test_row_72_disconnect_in_prefill(stage: Stage, figure: Figure, steps: Pipe) -> None:
    """Accepted, and nothing generated yet: the first step of an answer is its prefill, and it does not end."""
    where = address(stage)
    long = posted(chat("stepped", max_tokens=5000, stream=True, text="[[tokens 5000]]"))
    (log,) = (stage.lmx.home / "logs").glob("stepped-*.log")

    def finished() -> list[dict[str, Any]]:
        return events_in(log, "request_finished")

    times, before = [], len(finished())
    with undisturbed(stage.lmx):
        for _ in range(7):
            steps.take_back()
            crowd = [await connected(where, long) for _ in range(32)]
            async with asyncio.timeout(PATIENCE_S):
                for reader, _ in crowd:
                    await reader.readuntil(b"200 OK")
            left_at = time.monotonic()
            for _, writer in crowd:
                writer.close()
            async with asyncio.timeout(PATIENCE_S):
                while len(finished()) < before + 32:  # noqa: ASYNC110 - another process writes it
                    await asyncio.sleep(0.01)
            times.append(time.monotonic() - left_at)
            ended = finished()[before:]
            before += 32
            assert [entry["completion_tokens"] for entry in ended] == [0] * 32
            steps.let()  # the prefill that nobody waits for ends
        await running(stage, 0, 0, "stepped")
    figure("row 72", "32 in prefill gone", sorted(times)[len(times) // 2], target=STEP_S)
    last = ask(stage.lmx.url, "stepped", max_tokens=1)
    steps.let(9)
    assert last.wait().whole


# -- 73 and 74 ----------------------------------------------------------------------------------------------------


def slow_reader(stage: Stage, model: str, stack: contextlib.ExitStack) -> socket.socket:
    """Ask for tens of thousands of tokens, on a connection that holds few of them."""
    reader = stack.enter_context(socket.socket())
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.settimeout(PATIENCE_S)
    reader.connect(address(stage))
    reader.sendall(posted(chat(model, max_tokens=32_000, stream=True, text="[[tokens 32000]]")))
    return reader


def assert_cut(readers: list[socket.socket]) -> None:
    """Read what is left of the answers: none looks whole."""
    for reader in readers:
        last = b""
        with contextlib.suppress(ConnectionError):
            while data := reader.recv(1 << 16):
                last = data
        assert b"[DONE]" not in last


def test_row_73_slow_reader(stage: Stage, figure: Figure) -> None:
    """One byte now and then: it is cut off for what waits for it, and not only once nobody waits any more."""
    dropped = logged(stage, "slow_client")
    process = psutil.Process(gateway_of(stage.lmx)["pid"])

    (usual, usual_p99), memory = took(stage.lmx.url, OTHER, 50, max_tokens=5), process.memory_info().rss
    with contextlib.ExitStack() as stack, undisturbed(stage.lmx):
        readers = [slow_reader(stage, "fast", stack) for _ in range(4)]
        meanwhile, p99 = took(stage.lmx.url, OTHER, 50, max_tokens=5)
        for _ in deadline(3 * PATIENCE_S):
            for reader in readers:
                with contextlib.suppress(ConnectionError):
                    reader.recv(1)
            if logged(stage, "slow_client") - dropped >= len(readers):
                break
        assert logged(stage, "slow_client") - dropped == len(readers)
        of_usual = 100 * p99 / usual_p99
        figure("row 73", "p99 of others beside 4 slow readers, of the usual", of_usual, target=110, unit="%")
        # The worst of many is as bad as the machine is busy.
        assert meanwhile < 3 * usual + 0.2
        idle(stage.lmx, "fast")
        assert_cut(readers)
        assert process.memory_info().rss - memory < 50 * 1024 * 1024


def test_row_73_reader_that_has_stopped(tiny_model: Path, tmp_path: Path, figure: Figure) -> None:
    """Little waits for it, and it takes nothing: 30 s, scaled to 1.5 s."""
    assert WRITE_STALL_S == 30.0
    patch = SMALL_BUFFERS + "import gateway.stream\ngateway.stream.WRITE_STALL_S = 1.5\n"
    with (
        stage_of(tiny_model, **patched(tmp_path / "site", gateway=patch)) as stage,
        contextlib.ExitStack() as stack,
        undisturbed(stage.lmx),
    ):
        # So few in a second that what waits stays far below its bound.
        stage.plans(FaultPlan(models=("second",), tokens_per_s=1000))
        load(stage, "second")
        began = time.monotonic()
        readers = [slow_reader(stage, "second", stack)]
        for _ in deadline(2 * PATIENCE_S):
            if logged(stage, "slow_client"):
                break
        assert logged(stage, "slow_client") == 1
        figure("row 73", "cut off, 1.5 s after its buffers are full", time.monotonic() - began, target=5.0)
        idle(stage.lmx, "second")  # the worker was told
        assert_cut(readers)


def test_row_74_slow_heads_and_bodies(stage: Stage, figure: Figure) -> None:
    """500 half-open connections, scaled from 10 s and 30 s to 1.5 s."""
    assert (HEAD_TIMEOUT_S, BODY_TIMEOUT_S) == (10.0, 30.0)
    process = psutil.Process(gateway_of(stage.lmx)["pid"])
    with contextlib.ExitStack() as crowd, undisturbed(stage.lmx):
        usual = process.num_fds()
        half: list[tuple[socket.socket, bytes]] = []
        began = time.monotonic()
        for number in range(500):
            begun = (b"", b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n", b"GET /he")[number % 3]
            if number % 10 == 0:
                begun = (
                    b'POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 900\r\n\r\n{"model": "'
                )
            sock = crowd.enter_context(socket.create_connection(address(stage), timeout=PATIENCE_S))
            sock.sendall(begun)
            half.append((sock, begun))
        made = time.monotonic()
        assert answers(stage.lmx.url) < 15
        assert ask(stage.lmx.url).wait().whole
        for sock, begun in half:
            got = b""
            with contextlib.suppress(ConnectionError):
                while data := sock.recv(4096):
                    got += data
            assert got == b"" or got.startswith(b"HTTP/1.1 408 "), got
            if begun:
                assert b'"code":"request_timeout"' in got
        figure("row 74", "500 half-open connections are closed, deadline 1.5 s", time.monotonic() - began, target=2.5)
        assert time.monotonic() - made < PATIENCE_S, "busy as the machine may be: no other limit is so short"
        for _ in deadline(PATIENCE_S):  # the others come and go
            if process.num_fds() <= usual + 5:
                break
        else:
            raise AssertionError((process.num_fds(), usual))
    idle(stage.lmx)


# -- 75 to 79 -----------------------------------------------------------------------------------------------------


def test_row_75_body_too_large(stage: Stage) -> None:
    """Memory while a client sends on and on: tests/e2e/test_gateway_bad_input.py."""
    with undisturbed(stage.lmx), socket.create_connection(address(stage), timeout=PATIENCE_S) as sock:
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 107374182400\r\n\r\n"
            + b"x" * 999
        )
        head = sock.recv(65536)
        assert head.startswith(b"HTTP/1.1 413 ")
        assert ask(stage.lmx.url).wait().whole


def test_row_76_nonsense_in_bodies(stage: Stage) -> None:
    """With the fields they name: tests/e2e/test_gateway_bad_input.py. Any bytes at all: tests/unit/test_validate.py."""
    good = json.dumps(chat(OTHER, max_tokens=3, stream=False)).encode()
    bodies = [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"a":' * 50_000,
        b"nul",
        b"NaN",
        b'"\\ud800"',
        good[:-1] + b',"temperature":NaN}',
        good[:-1] + b',"temperature":1e999}',
        good[:-1] + b',"seed":' + b"9" * 5000 + b"}",
        good[:-1] + b',"messages":{}}',
        good.replace(b"Hello", b"\xed\xa0\x80"),
        good.replace(b"Hello", b"\\ud83d"),
        good.replace(b"false", b"0"),
        good + good,
    ]
    with undisturbed(stage.lmx), httpx.Client(base_url=stage.lmx.url, timeout=PATIENCE_S) as http:
        for body in bodies:
            answer = http.post("/v1/chat/completions", content=body)
            assert answer.status_code == 400, (body[:60], answer.text)
            assert answer.json()["error"]["code"]
        assert http.post("/v1/chat/completions", content=good).status_code == 200


def test_row_78_context_too_long_and_max_tokens_huge(stage: Stage) -> None:
    """By tokens; what the KV cache of a request would need is a later issue."""
    limit = 4096
    with undisturbed(stage.lmx), httpx.Client(base_url=stage.lmx.url, timeout=PATIENCE_S) as http:

        def code(words: int, max_tokens: int | None) -> tuple[int, str]:
            body = {**chat(OTHER, max_tokens=1, stream=False, text="w " * words), "max_tokens": max_tokens}
            answer = http.post("/v1/chat/completions", json=body)
            return answer.status_code, answer.json().get("error", {}).get("code", "")

        assert code(limit - 1, 1) == (200, "")
        assert code(limit - 1, 32_768) == (200, "")
        assert code(limit, 1) == (400, "context_length_exceeded")
        assert code(100 * limit, 1) == (400, "context_length_exceeded")
        assert code(limit, None) == (400, "context_length_exceeded")
        for huge in (32_769, 2**31, 2**63, 10**30, 0, -1):
            assert code(1, huge) == (400, "invalid_value"), huge


async def test_row_79_burst(tiny_model: Path, figure: Figure) -> None:
    """200 requests per second for what can do ten. The queue refuses them: nobody waits for a time limit to do it."""
    settings = {
        "LMX_MODELS__MAX_CONCURRENT_REQUESTS": "4",
        "LMX_MODELS__QUEUE_DEPTH": "8",
        "LMX_MODELS__SLOT_TIMEOUT_S": "30",
    }
    with stage_of(tiny_model, **settings) as stage:
        stage.plans(FaultPlan(models=("busy",), tokens_per_s=50))
        load(stage, "busy")
        where, request = address(stage), posted(chat("busy", max_tokens=20, stream=False))
        took: dict[int, list[float]] = {200: [], 429: [], 503: []}

        async def one() -> None:
            began = time.monotonic()
            reader, writer = await connected(where, request)
            head = await reader.readuntil(b"\r\n\r\n")
            status = int(head.split()[1])
            assert status in took, head
            took[status].append(time.monotonic() - began)
            assert status == 200 or b"retry-after:" in head.lower()
            writer.close()

        with undisturbed(stage.lmx):
            async with asyncio.timeout(60), asyncio.TaskGroup() as group:
                began = time.monotonic()
                for number in range(500):
                    await asyncio.sleep(max(0.0, began + number / 200 - time.monotonic()))
                    group.create_task(one())
        assert sum(map(len, took.values())) == 500, "an answer for each"
        accepted, refused = sorted(took[200]), sorted(took[429] + took[503])
        assert len(accepted) >= 12
        assert len(took[429]) >= 300
        p99 = accepted[int(len(accepted) * 0.99)]
        figure("row 79", "p99 of what was accepted; 12 places of 0.4 s", p99, target=3 * 0.4 + 3)
        figure("row 79", "p99 of what was refused", refused[int(len(refused) * 0.99)], target=1.0)
        assert p99 < 25
        assert refused[-1] < 25, "before the time limit for a slot"
        idle(stage.lmx)
        assert ask(stage.lmx.url, "busy").wait().whole


# -- 81 to 84 -----------------------------------------------------------------------------------------------------


def test_row_81_admin_without_a_key_is_closed(stage: Stage) -> None:
    """Whoever one says to be, none of the admin routes answers."""
    spoofed = {"x-forwarded-for": "127.0.0.1", "forwarded": "for=127.0.0.1", "x-real-ip": "::1", "host": "localhost"}
    paths = ["health", "models/load", "models/unload", "models/restart", "config/reload", "logs", "events", "audit"]
    with undisturbed(stage.lmx), httpx.Client(base_url=stage.lmx.url, timeout=PATIENCE_S, headers=spoofed) as http:
        for path in (*paths, "", "../admin/logs", "%2e%2e/admin/logs"):
            for method in ("GET", "POST", "DELETE"):
                answer = http.request(method, f"/admin/{path}")
                assert answer.status_code in {401, 403, 404, 405}, (method, path)
        page = http.get("/ui")  # empty: what it shows it asks for with the key that is typed in
        assert (page.status_code, OTHER in page.text) == (200, False)
    assert "x-forwarded" not in (stage.lmx.home / "logs" / "gateway.log").read_text()


NAMES = [
    "../../etc/passwd",
    "..\\..\\etc",
    "/etc/passwd",
    "file:///etc/passwd",
    "models/../../../etc/hostname",
    "other\0",
    "other/../other",
    "other\n",
    "%2e%2e%2fetc%2fpasswd",
    "$(touch /tmp/lmx-pwned)",
    "`id`",
    "'; DROP TABLE models; --",
    "{{7*7}}",
    "\uff4fther",  # a wide o
    "\u043ether",  # a Cyrillic one
    "\u202eother",
    "OTHER",
    " other",
    "a" * 10_000,
    "https://huggingface.co/org/model",
]


def test_row_82_model_names_reach_no_file(stage: Stage, site: Path) -> None:
    with undisturbed(stage.lmx), httpx.Client(base_url=stage.lmx.url, timeout=PATIENCE_S) as http:
        assert http.get("/v1/models/nothing").status_code == 404  # what an error imports, it imports now
        assert ask(stage.lmx.url, "nothing").wait().status == 404
        before = (site / "opened").read_bytes()
        assert b"open" in before, "the gateway is not watched"
        for name in NAMES:
            answer = http.post("/v1/chat/completions", json=chat(name, max_tokens=1, stream=False))
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), name
            raw = "".join(f"%{byte:02x}" for byte in name.encode())
            assert http.get(f"/v1/models/{raw}").status_code == 404, name
            with contextlib.suppress(httpx.InvalidURL):
                assert http.get(f"/v1/models/{name[:500]}").status_code in {200, 404}, name
        assert (site / "opened").read_bytes() == before, "a name of a client reached the file system"
    assert not Path("/tmp/lmx-pwned").exists()


def test_row_83_unloaded_model_asked_for_again_and_again(stage: Stage) -> None:
    """Only an operator loads. Two names in turn, from many clients."""
    since = time.time()
    (stage.lmx.home / "models").mkdir(exist_ok=True)
    with undisturbed(stage.lmx):
        calls = [ask(stage.lmx.url, name, max_tokens=1) for _ in range(30) for name in ("lain-a", "lain-b")]
        for call in calls:
            call.wait()
            assert (call.status, call.code) in {(404, "model_not_found"), (503, "model_not_found")}, repr(call)
    assert events_since(stage.lmx, since, "process_started") == []


def test_row_84_nothing_of_a_request_is_written(tiny_model: Path) -> None:
    """Through every way in which a request can end, and in crash records, journal, state and logs at DEBUG."""
    secret, key = "Okapi-Marker-48213", "sk-marker-99881"
    with stage_of(tiny_model, LMX_LOG__LEVEL="DEBUG") as stage:
        lmx = stage.lmx
        load(stage, "second")
        headers = {"Authorization": f"Bearer {key}", "X-LMX-On-Crash": "fail"}
        with undisturbed(lmx):
            for deed in ("abort 3", "kill 3", "exit 87 3", "raise 3", "garbage", "wrong", "twice", "io"):
                before = lmx.model("second")
                call = ask(lmx.url, "second", f"{secret} [[{deed}]] {secret}", headers=headers)
                call.wait()
                if deed.split()[0] in {"abort", "kill", "exit", "raise", "io"}:
                    lmx.wait_model("second", other_than=before["incarnation"])
                else:
                    lmx.wait_model("second")
            with httpx.Client(base_url=lmx.url, timeout=PATIENCE_S, headers=headers) as http:
                url = "/v1/chat/completions"
                http.post(url, content=f'{{"{secret}": "{secret}'.encode())
                http.post(
                    url, json={**chat("second", max_tokens=2, stream=False), "stop": [secret] * 9, secret: secret}
                )
                http.post(url, json=chat(secret, max_tokens=2, stream=False, text=secret))
                http.post(url, json=chat("second", max_tokens=2, stream=False, text=secret), headers={"x-a": secret})
                http.get(f"/v1/models/{secret}", params={"q": secret})
                http.get(f"/{secret}%0a%09%1b[31m{secret}")
            began = time.time()
            os.kill(lmx.model("second")["pid"], signal.SIGABRT)
            event_since(lmx, began, "process_exited", model="second")
            lmx.wait_model("second")
        assert list((lmx.home / "crashes").iterdir()), "crashes were recorded"
        assert lmx.stop() == 0
        written = [file for file in lmx.home.rglob("*") if file.is_file()]
        assert len(written) > 10
        hits = [str(file) for file in written for word in (secret, key) if word.encode() in file.read_bytes()]
        assert hits == []
        for file in (lmx.home / "logs").glob("*.log"):
            for line in file.read_bytes().splitlines():
                json.loads(line)  # each line is one event, whatever clients called things
