"""The promise: a crash in one process is that process's affair (real MLX workers, real signals, real sockets)."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.harness import Lmx, Stream, chat, deadline, read_stream

STREAMS = 8
LONG = 6000
#: An end is told by a signal of the system at once, some 50 ms on an idle machine (the figure is measured by bench).
#: Without it, it would be found out by a deadline: `lifecycle.heartbeat_hung_s` is 15 s.
TOLD_S = 8.0
#: Nobody who is late is ended instead of adopted; who waits for all goes on as soon as they are there.
PATIENT = {"LMX_LIFECYCLE__ADOPT_S": "30"}


@pytest.fixture
def two_models(new_lmx: Callable[..., Lmx], tiny_model: Path) -> Lmx:
    lmx = new_lmx().start()
    lmx.load(tiny_model, "alpha")
    lmx.load(tiny_model, "beta")
    return lmx


def client(lmx: Lmx) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=lmx.url, timeout=60, limits=limits)


async def watch_health(http: httpx.AsyncClient, stop: asyncio.Event, failures: list[str], polls: list[float]) -> None:
    """Ask /healthz every 10 ms on one connection until told to stop."""
    while not stop.is_set():
        asked = time.monotonic()
        try:
            response = await http.get("/healthz", timeout=5)
            if response.status_code != 200:
                failures.append(f"status {response.status_code}")
        except httpx.HTTPError as error:
            failures.append(type(error).__name__)
        polls.append(time.monotonic() - asked)
        await asyncio.sleep(0.01)


def open_things(pid: int) -> tuple[int, int]:
    process = psutil.Process(pid)
    return process.num_fds(), process.num_threads()


def requests_of(model: dict[str, Any]) -> int:
    return (model["running"] or 0) + (model["waiting"] or 0)


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV, signal.SIGKILL])
async def test_a_signal_in_one_model_leaves_the_other_and_the_api_alone(
    new_lmx: Callable[..., Lmx], tiny_model: Path, number: signal.Signals
) -> None:
    lmx = new_lmx(LMX_GATEWAY__ON_CRASH="fail").start()
    for model in ("alpha", "beta"):
        lmx.load(tiny_model, model)
    document = lmx.status()
    assert document is not None
    victim = lmx.model("alpha")
    bystander_pid = lmx.model("beta")["pid"]
    gateway_pid, supervisor_pid = document["gateway"]["pid"], document["supervisor"]["pid"]
    async with client(lmx) as http, client(lmx) as health:
        warm = await asyncio.gather(*(read_stream(http, chat(m, max_tokens=2, stream=True)) for m in ("alpha", "beta")))
        assert all(stream.done for stream in warm)
        lmx.wait_status(lambda doc: all(m["memory_bytes"] for m in doc["models"]))  # the sampling thread has started
        before = {pid: open_things(pid) for pid in (gateway_pid, supervisor_pid)}

        running: set[int] = set()
        all_running = asyncio.Event()

        def note(stream: Stream) -> None:
            if len(stream.chunks) > 1:
                running.add(id(stream))
            if len(running) == 2 * STREAMS:
                all_running.set()

        doomed = [
            asyncio.create_task(read_stream(http, chat("alpha", max_tokens=LONG, stream=True), note))
            for _ in range(STREAMS)
        ]
        others = [
            asyncio.create_task(read_stream(http, chat("beta", max_tokens=400, stream=True), note))
            for _ in range(STREAMS)
        ]
        waiting = [
            asyncio.create_task(http.post("/v1/chat/completions", json=chat("alpha", max_tokens=LONG, stream=False)))
            for _ in range(3)
        ]
        stop, failures, polls = asyncio.Event(), [], []
        poller = asyncio.create_task(watch_health(health, stop, failures, polls))
        await asyncio.wait_for(all_running.wait(), 60)
        # What follows waits in threads: a loop that stands still lets the requests of the poller run into their time.
        await asyncio.to_thread(lmx.wait_status, lambda doc: requests_of(doc["models"][0]) == STREAMS + 3)

        killed_at = time.time()
        psutil.Process(victim["pid"]).send_signal(number)
        ended = await asyncio.wait_for(asyncio.gather(*doomed), 20)
        told_after = time.time() - killed_at
        answers = await asyncio.wait_for(asyncio.gather(*waiting), 20)
        finished = await asyncio.wait_for(asyncio.gather(*others), 60)

        for stream in ended:
            assert stream.error is not None, stream.broken
            assert stream.error["code"] == "worker_crashed"
            assert stream.error["request_id"]
            assert not stream.done
            assert len(stream.chunks) > 1
        for answer in answers:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "worker_crashed")
            assert int(answer.headers["retry-after"]) >= 1
        reference = finished[0].text
        for stream in finished:
            assert (stream.error, stream.done, stream.finish) == (None, True, "length")
            assert stream.text == reference
        assert told_after < TOLD_S

        exited = await asyncio.to_thread(lmx.wait_event, "process_exited", model="alpha")
        assert exited["ts"] - killed_at < TOLD_S
        assert exited["signal"] == number.name
        new_pid = await asyncio.to_thread(lmx.wait_model, "alpha", other_than=victim["incarnation"])
        assert new_pid != victim["pid"]
        again = await read_stream(http, chat("alpha", max_tokens=5, stream=True))
        assert again.done
        stop.set()
        await poller
    assert failures == []
    assert len(polls) > 5
    after = lmx.model("alpha")
    assert (after["restarts"], after["last_exit"]["signal"]) == (1, number.name)
    assert lmx.model("beta")["pid"] == bystander_pid
    document = lmx.status()
    assert document is not None
    assert document["gateway"]["pid"] == gateway_pid

    # Nothing of the dead incarnation is left: no process, socket file, spec file or descriptor.
    names = [entry.name for entry in (lmx.home / "run").iterdir() if f".{victim['incarnation']}." in entry.name]
    assert names == []
    for _ in deadline(30):
        now = {pid: open_things(pid) for pid in (gateway_pid, supervisor_pid)}
        if all(now[pid][0] <= before[pid][0] and now[pid][1] <= before[pid][1] for pid in now):
            break
    else:
        raise AssertionError((before, now))
    assert lmx.stop() == 0
    assert lmx.processes() == []
    assert [entry.name for entry in (lmx.home / "run").iterdir() if entry.suffix == ".sock"] == []


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV, signal.SIGKILL])
async def test_with_continuation_the_streams_of_the_model_itself_do_not_notice(
    two_models: Lmx, number: signal.Signals
) -> None:
    lmx = two_models
    victim = lmx.model("alpha")
    async with client(lmx) as http, client(lmx) as health:
        # The other model has the same weights: its text is what the first one's has to be.
        bodies = {model: chat(model, max_tokens=300, stream=True) for model in ("alpha", "beta")}
        begun: set[int] = set()
        all_begun = asyncio.Event()

        def note(stream: Stream) -> None:
            if len(stream.text) > 20:  # not chunks: a reader that was held up gets many tokens in one
                begun.add(id(stream))
            if len(begun) == STREAMS:
                all_begun.set()

        streams = [asyncio.create_task(read_stream(http, bodies["alpha"], note)) for _ in range(STREAMS)]
        whole = asyncio.create_task(http.post("/v1/chat/completions", json=chat("alpha", max_tokens=300, stream=False)))
        stop, failures, polls = asyncio.Event(), [], []
        poller = asyncio.create_task(watch_health(health, stop, failures, polls))
        await asyncio.wait_for(all_begun.wait(), 60)
        os.kill(victim["pid"], number)
        ended = await asyncio.wait_for(asyncio.gather(*streams), 60)
        answer = (await asyncio.wait_for(whole, 60)).json()
        reference = await read_stream(http, bodies["beta"])
        stop.set()
        await poller
    assert failures == []
    for stream in ended:
        assert (stream.error, stream.broken, stream.done, stream.finish) == (None, "", True, "length")
        assert stream.text == reference.text
    assert answer["choices"][0]["message"]["content"] == reference.text
    assert answer["usage"]["completion_tokens"] == 300
    lmx.wait_model("alpha", other_than=victim["incarnation"])
    assert lmx.model("alpha")["restarts"] == 1


async def test_a_request_while_the_model_restarts_gets_a_503_with_a_code(
    new_lmx: Callable[..., Lmx], tiny_model: Path
) -> None:
    lmx = new_lmx(LMX_LIFECYCLE__RESTART_DELAYS_S="[20.0]", LMX_GATEWAY__HOLD_WHILE_RESTARTING_S="0").start()
    lmx.load(tiny_model, "alpha")
    psutil.Process(lmx.model("alpha")["pid"]).kill()
    lmx.wait_model("alpha", "backoff")
    async with client(lmx) as http:
        for _ in deadline(30):  # until the gateway has heard of it, too
            if (await http.get("/v1/models/alpha")).json()["state"] == "backoff":
                break
        response = await http.post("/v1/chat/completions", json=chat("alpha", max_tokens=5, stream=True))
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_restarting")
    assert 1 <= int(response.headers["retry-after"]) <= 120


async def test_killing_the_supervisor_fails_no_request_and_the_next_one_adopts_everything(two_models: Lmx) -> None:
    lmx = two_models
    before = lmx.status()
    assert before is not None
    url = lmx.url
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        streams = [asyncio.create_task(read_stream(http, chat("alpha", max_tokens=800, stream=True))) for _ in range(4)]
        await read_stream(http, chat("beta", max_tokens=1, stream=True))
        lmx.kill_supervisor()
        assert (await http.get("/healthz")).status_code == 200
        orphaned = await read_stream(http, chat("beta", max_tokens=5, stream=True))
        assert orphaned.done
        lmx.start(**PATIENT)
        after = lmx.wait_status(
            lambda doc: all(m["state"] == "ready" for m in doc["models"]) and len(doc["models"]) == 2
        )
        ended = await asyncio.gather(*streams)
    assert [stream.done for stream in ended] == [True] * 4
    assert after["supervisor"]["pid"] != before["supervisor"]["pid"]
    assert after["gateway"]["pid"] == before["gateway"]["pid"]
    assert {m["id"]: m["pid"] for m in after["models"]} == {m["id"]: m["pid"] for m in before["models"]}
    assert after["gateway"]["url"] == url

    # The adopted gateway's death is seen, and the port, which came back with it, goes on.
    psutil.Process(after["gateway"]["pid"]).kill()
    lmx.wait_status(lambda doc: doc["gateway"]["state"] == "ready" and doc["gateway"]["pid"] != after["gateway"]["pid"])
    assert lmx.url == url
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        assert (await read_stream(http, chat("alpha", max_tokens=5, stream=True))).done
    # So is an adopted worker's.
    worker = lmx.model("beta")
    psutil.Process(worker["pid"]).send_signal(signal.SIGABRT)
    lmx.wait_model("beta", other_than=worker["incarnation"])


async def test_supervisor_gateway_and_workers_killed_together_come_back_live(two_models: Lmx) -> None:
    lmx = two_models
    before = lmx.status()
    assert before is not None
    lmx.kill_everything()
    lmx.start()
    after = lmx.wait_status(lambda doc: len(doc["models"]) == 2 and all(m["state"] == "ready" for m in doc["models"]))
    assert {m["pid"] for m in after["models"]}.isdisjoint({m["pid"] for m in before["models"]})
    async with client(lmx) as http:
        for model in ("alpha", "beta"):
            assert (await read_stream(http, chat(model, max_tokens=5, stream=True))).done


def test_a_left_behind_process_that_cannot_be_adopted_is_ended_before_a_new_one_starts(two_models: Lmx) -> None:
    lmx = two_models
    frozen = lmx.model("alpha")["pid"]
    lmx.kill_supervisor()
    psutil.Process(frozen).suspend()
    lmx.start(LMX_LIFECYCLE__ADOPT_S="1", LMX_LIFECYCLE__STOP_MIN_S="1")
    new = lmx.wait_model("alpha")
    assert new != frozen
    assert frozen not in {process.pid for process in lmx.processes()}
    workers = [p for p in lmx.processes() if "worker" in p.cmdline() and "alpha" in " ".join(p.cmdline())]
    assert [p.pid for p in workers] == [new]


async def test_a_dead_gateway_means_waiting_connections_and_no_reload(two_models: Lmx) -> None:
    lmx = two_models
    before = lmx.status()
    assert before is not None
    address = httpx.URL(lmx.url)
    psutil.Process(before["gateway"]["pid"]).kill()
    # Right away, while nobody accepts: the kernel takes the connection, the next gateway answers it.
    with socket.create_connection((str(address.host), int(address.port or 0)), timeout=10) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        raw.settimeout(30)
        assert raw.recv(64).startswith(b"HTTP/1.1 200")
    after = lmx.wait_status(lambda doc: doc["gateway"]["state"] == "ready")
    assert after["gateway"]["restarts"] == 1
    assert [m["pid"] for m in after["models"]] == [m["pid"] for m in before["models"]]
    async with client(lmx) as http:
        assert (await read_stream(http, chat("alpha", max_tokens=5, stream=True))).done


def test_a_second_supervisor_on_the_same_home_refuses_to_start(two_models: Lmx) -> None:
    lmx = two_models
    before = lmx.status()
    done = lmx.cli("run", check=False)
    assert done.returncode == 1
    assert str(lmx.process.pid if lmx.process else "?") in done.stderr
    after = lmx.status()
    assert before is not None
    assert after is not None
    assert [m["pid"] for m in after["models"]] == [m["pid"] for m in before["models"]]


async def test_restart_worker_replaces_one_process_and_cuts_no_stream(two_models: Lmx) -> None:
    lmx = two_models
    old, other = lmx.model("alpha")["pid"], lmx.model("beta")["pid"]
    started = asyncio.Event()
    async with client(lmx) as http:
        stream = asyncio.create_task(
            read_stream(http, chat("alpha", max_tokens=300, stream=True), lambda _: started.set())
        )
        await asyncio.wait_for(started.wait(), 30)
        done = await asyncio.to_thread(lmx.cli, "restart-worker", "alpha")
        result = await stream
    new = lmx.model("alpha")["pid"]
    assert new != old
    assert str(old) in done.stdout
    assert str(new) in done.stdout
    assert lmx.model("beta")["pid"] == other
    assert (result.done, result.error) == (True, None)


async def test_sixteen_streams_of_one_model_run_together(two_models: Lmx) -> None:
    """Batched, not one after the other: all have begun before any has ended.

    The answers are far longer than whoever reads them could be held up, and are given up once that has been seen.
    """
    begun: set[int] = set()
    all_begun = asyncio.Event()

    async def one(http: httpx.AsyncClient, number: int) -> None:
        def note(stream: Stream) -> None:
            if stream.text:
                begun.add(number)
            if len(begun) == 16:
                all_begun.set()

        await read_stream(http, chat("alpha", max_tokens=LONG, stream=True, text=f"Number {number}"), note)

    async with client(two_models) as http:
        streams = [asyncio.create_task(one(http, number)) for number in range(16)]
        seen = asyncio.create_task(all_begun.wait())
        await asyncio.wait([seen, *streams], timeout=60, return_when=asyncio.FIRST_COMPLETED)
        assert all_begun.is_set(), f"{len(begun)} had begun when one ended"
        assert not any(stream.done() for stream in streams)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        # Whoever comes now has a slot at once, and its whole answer.
        last = await read_stream(http, chat("alpha", max_tokens=120, stream=True))
    assert (last.done, last.finish) == (True, "length")


def test_ctrl_c_ends_everything_with_exit_code_0(two_models: Lmx) -> None:
    lmx = two_models
    assert lmx.stop(signal.SIGINT) == 0
    assert lmx.processes() == []
    with contextlib.suppress(FileNotFoundError):
        assert not any(entry.suffix == ".sock" for entry in (lmx.home / "run").iterdir())
    lmx.start()
    lmx.wait_status(lambda doc: len(doc["models"]) == 2 and all(m["state"] == "ready" for m in doc["models"]))
