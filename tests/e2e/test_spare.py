"""The warm spare: a recovery without the imports (real MLX)."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

from tests.harness import Lmx, chat, read_stream


def spare_pid(lmx: Lmx) -> int:
    """Wait for a spare that is ready and return its pid."""
    return int(lmx.wait_status(lambda doc: doc["spare"]["state"] == "ready")["spare"]["pid"])


def work_of(pid: int) -> float:
    """Return the seconds that a process has computed: what it has to do, on whatever machine and however held up."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


async def test_a_crashed_model_comes_back_in_the_spare_and_sooner(
    new_lmx: Callable[..., Lmx], tiny_model: Path
) -> None:
    # A spare that answers no beat counts as frozen: so seldom that one that is held up for a second does not.
    beats = {"LMX_LIFECYCLE__HEARTBEAT_S": "3", "LMX_LIFECYCLE__GATEWAY_HUNG_S": "60"}
    lmx = new_lmx(LMX_WORKER__SPARE="true", **beats).start()
    first = spare_pid(lmx)
    lmx.load(tiny_model, "one")
    assert lmx.model("one")["pid"] == first, "the first load takes the spare too"
    second = spare_pid(lmx)

    victim = lmx.model("one")
    done_before = work_of(second)
    killed_at = time.time()
    psutil.Process(victim["pid"]).kill()
    assert lmx.wait_model("one", other_than=victim["incarnation"]) == second
    work_with = work_of(second) - done_before
    ready = lmx.wait_event("model_readiness_changed", pid=second, state="ready")
    with_spare = ready["ts"] - killed_at

    third = spare_pid(lmx)
    psutil.Process(third).kill()
    lmx.wait_event("spare_exited", pid=third)
    victim = lmx.model("one")
    killed_at = time.time()
    psutil.Process(victim["pid"]).kill()
    cold = lmx.wait_model("one", other_than=victim["incarnation"])
    work_without = work_of(cold)
    ready = lmx.wait_event("model_readiness_changed", pid=cold, state="ready")
    without = ready["ts"] - killed_at
    assert with_spare < without + 5
    assert work_with < work_without / 2, (work_with, work_without)
    async with httpx.AsyncClient(base_url=lmx.url, timeout=30) as http:
        assert (await read_stream(http, chat("one", max_tokens=5, stream=True))).done
    log = next((lmx.home / "logs").glob("one-*.log")).read_text()
    assert log.count('"event":"worker_ready"') == 3
    assert lmx.stop() == 0
    assert lmx.processes() == []


def test_a_spare_is_adopted_by_the_next_supervisor(new_lmx: Callable[..., Lmx]) -> None:
    lmx = new_lmx(LMX_WORKER__SPARE="true").start()
    pid = spare_pid(lmx)
    lmx.kill_supervisor()
    lmx.start(LMX_LIFECYCLE__ADOPT_S="30")
    lmx.wait_event("process_adopted", slot="spare", pid=pid)
    assert len([e for e in lmx.journal() if e["event"] == "spare_started"]) == 1
    assert lmx.stop() == 0
    assert lmx.processes() == []


def test_a_frozen_spare_is_not_waited_for_and_is_ended(new_lmx: Callable[..., Lmx], tiny_model: Path) -> None:
    lmx = new_lmx(
        LMX_WORKER__SPARE="true", LMX_LIFECYCLE__HEARTBEAT_S="0.2", LMX_LIFECYCLE__HEARTBEAT_HUNG_S="15"
    ).start()
    lmx.load(tiny_model, "one")
    frozen = spare_pid(lmx)
    os.kill(frozen, signal.SIGSTOP)
    # Twice: in the first one an answer that it sent before may still have been unread.
    for _ in range(2):
        lmx.wait_status(lambda doc: doc["spare"]["state"] == "starting")
    victim = lmx.model("one")
    psutil.Process(victim["pid"]).kill()
    assert lmx.wait_model("one", other_than=victim["incarnation"]) != frozen
    assert [e for e in lmx.journal() if e["event"] == "hung"] == [], "a model was given to it"
    assert lmx.wait_event("spare_exited")["pid"] == frozen
