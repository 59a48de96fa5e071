"""The end of a supervisor, with something in its way: orders that cross each other, on real processes without MLX."""

import asyncio
import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from protocol import control
from protocol.paths import Home
from supervisor.client import Client
from tests.harness import Lmx, Stream, chat, deadline, read_stream


@pytest.fixture
def lmx(new_lmx: Callable[..., Lmx]) -> Lmx:
    return new_lmx(LMX_WORKER__MODULE="tests.fault", LMX_FAULT='{"tokens_per_s": 100, "answer_tokens": 4000}')


def order(lmx: Lmx, request: control.LoadRequest | control.UnloadRequest | control.RestartRequest) -> control.Result:
    """Send a command on a connection that is there already when something else is asked."""
    client = Client(Home(lmx.home))
    try:
        return next(m for m in client.ask(request, within_s=60) if isinstance(m, control.Result))
    finally:
        client.close()


def wait_logged(lmx: Lmx, event: str) -> None:
    for _ in deadline(30):
        if f'"event":"{event}"' in (lmx.home / "logs" / "supervisor.log").read_text():
            return
    raise AssertionError((event, lmx.tail()))


async def test_a_stop_does_not_wait_for_a_model_that_nobody_will_start_again(lmx: Lmx, tiny_model: Path) -> None:
    lmx.environ |= {
        "LMX_LIFECYCLE__DRAIN_S": "100",
        "LMX_LIFECYCLE__RESTART_DELAYS_S": "[200.0]",
        "LMX_GATEWAY__HOLD_WHILE_RESTARTING_S": "200",
    }
    lmx.start()
    lmx.load(tiny_model, "one")
    psutil.Process(lmx.wait_model("one")).kill()
    lmx.wait_model("one", "backoff")
    async with httpx.AsyncClient(base_url=lmx.url, timeout=90) as http:
        held = asyncio.create_task(http.post("/v1/chat/completions", json=chat("one", max_tokens=5, stream=False)))
        async with asyncio.timeout(30):
            while 'waiting{model_name="one"} 1.0' not in (await http.get("/metrics")).text:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.02)
        assert await asyncio.to_thread(lmx.stop) == 0  # within 60 s
        answer = await held
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
    assert 1 <= int(answer.headers["retry-after"]) <= 120


async def test_a_stop_waits_for_the_requests_of_a_gateway_that_was_replaced(lmx: Lmx, tiny_model: Path) -> None:
    lmx.environ["LMX_LIFECYCLE__DRAIN_S"] = "30"
    lmx.start()
    lmx.load(tiny_model, "one")
    going = asyncio.Event()

    def begun(_: Stream) -> None:
        going.set()

    async with httpx.AsyncClient(base_url=lmx.url, timeout=60) as http:
        body = chat("one", max_tokens=600, stream=True)
        stream = asyncio.create_task(read_stream(http, body, begun))
        await asyncio.wait_for(going.wait(), 60)
        await asyncio.to_thread(lmx.cli, "upgrade")
        assert await asyncio.to_thread(lmx.stop) == 0
        result = await stream
    assert result.done, (result.error, result.broken)
    assert lmx.processes() == []


@pytest.mark.parametrize("moment", ["supervisor_handover", "supervisor_becomes_next_image"])
def test_a_signal_in_the_middle_of_a_hand_over_ends_the_supervisor(lmx: Lmx, moment: str) -> None:
    """Neither image may swallow it, nor die of it and leave its children behind."""
    lmx.start()
    assert lmx.process is not None
    lmx.process.send_signal(signal.SIGHUP)
    if moment == "supervisor_handover":
        lmx.wait_event(moment)
    else:
        wait_logged(lmx, moment)
    assert lmx.stop() == 0
    assert lmx.processes() == []


def test_a_load_that_comes_while_everything_stops_is_refused_and_delays_nothing(lmx: Lmx, tiny_model: Path) -> None:
    lmx.environ["LMX_FAULT"] = json.dumps({"ignore_sigterm": True})
    lmx.start()
    lmx.load(tiny_model, "stubborn")
    worker = psutil.Process(lmx.model("stubborn")["pid"])
    worker.suspend()  # it is ended by SIGKILL at the end of its grace, 3 s
    assert lmx.process is not None
    lmx.process.send_signal(signal.SIGTERM)
    lmx.wait_event("model_readiness_changed", model="stubborn", state="stopping")
    result = order(lmx, control.LoadRequest("late", str(tiny_model)))
    assert (result.exit_code, result.code) == (1, "shutting_down"), result
    assert lmx.process.wait(60) == 0
    assert lmx.processes() == []
    assert "late" not in (lmx.home / "state" / "desired").read_text()


def test_a_restart_of_what_is_unloaded_meanwhile_says_so(lmx: Lmx, tiny_model: Path) -> None:
    lmx.environ["LMX_FAULT"] = json.dumps({"ignore_sigterm": True})
    lmx.start()
    lmx.load(tiny_model, "stubborn")
    psutil.Process(lmx.model("stubborn")["pid"]).suspend()
    results: list[control.Result] = []
    request = control.RestartRequest("stubborn", force=True)
    restarting = threading.Thread(target=lambda: results.append(order(lmx, request)))
    restarting.start()
    lmx.wait_event("model_readiness_changed", model="stubborn", state="stopping")
    assert order(lmx, control.UnloadRequest("stubborn")).exit_code == 0
    restarting.join(60)
    assert [(result.exit_code, result.message) for result in results] == [(1, "stubborn was unloaded meanwhile")]
