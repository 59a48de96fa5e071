"""How fast a death is seen and made good, from the supervisor's own journal. Used by `bench/overhead.py`."""

import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator

from tests.harness import Lmx

#: Every restart is at once, as if the process had served for long: the delay is a setting, not a cost.
AT_ONCE = {
    "LMX_LIFECYCLE__STABLE_S": "0.001",
    "LMX_LIFECYCLE__FORGIVE_ONE_S": "0.001",
    "LMX_LIFECYCLE__FORGIVE_ALL_S": "0.001",
}
#: Between two kills; a process that has just become ready still has work to do.
_REST_S = 0.5


def measure_recovery(lmx: Lmx, model: str, repetitions: int, say: Callable[[str], None]) -> dict[str, list[float]]:
    """Return milliseconds by name of what was measured, one per repetition."""
    found: dict[str, list[float]] = {}
    for number in range(repetitions):
        say(f"recovery {number + 1}/{repetitions}")
        measured = [*_kill_worker(lmx, model), *_kill_gateway(lmx), *_ask_status(lmx)]
        for name, seconds in measured:
            found.setdefault(name, []).append(seconds * 1000)
    return found


def _kill_worker(lmx: Lmx, model: str) -> Iterator[tuple[str, float]]:
    time.sleep(_REST_S)
    pid = lmx.wait_model(model)
    at = time.time()
    os.kill(pid, signal.SIGKILL)
    yield "worker: SIGKILL to death seen", lmx.wait_event("process_exited", pid=pid)["ts"] - at
    lmx.wait_model(model, other_than=_incarnation(lmx, pid))
    started, ready = _next_life(lmx, pid, "model_readiness_changed")
    yield "worker: SIGKILL to next process started", started - at
    yield "worker: SIGKILL to ready again", ready - at


def _kill_gateway(lmx: Lmx) -> Iterator[tuple[str, float]]:
    time.sleep(_REST_S)
    document = lmx.status()
    assert document is not None
    pid, url = document["gateway"]["pid"], document["gateway"]["url"]
    at = time.time()
    os.kill(pid, signal.SIGKILL)
    with urllib.request.urlopen(f"{url}/healthz", timeout=30) as response:
        response.read()
    answered = time.time()
    lmx.wait_status(lambda doc: doc["gateway"]["state"] == "ready" and doc["gateway"]["pid"] != pid)
    started, ready = _next_life(lmx, pid, "gateway_state_changed")
    yield "gateway: process started to serving", ready - started
    yield "gateway: SIGKILL to next answer", answered - at


def _ask_status(lmx: Lmx) -> Iterator[tuple[str, float]]:
    at = time.perf_counter()
    lmx.cli("status", "--json")
    yield "`lmx-supervisor status`", time.perf_counter() - at


def _incarnation(lmx: Lmx, pid: int) -> int:
    return int(lmx.wait_event("process_exited", pid=pid)["incarnation"])


def _next_life(lmx: Lmx, pid: int, changed: str) -> tuple[float, float]:
    """Return when the process after `pid` was started and when it was ready, by the journal's clock."""
    journal = lmx.journal()
    ended = next(entry for entry in journal if entry["event"] == "process_exited" and entry["pid"] == pid)
    later = [entry for entry in journal if entry["ts"] >= ended["ts"] and entry.get("model") == ended["model"]]
    started = next(entry for entry in later if entry["event"] == "process_started")
    ready = next(
        entry
        for entry in later
        if entry["event"] == changed and entry["state"] == "ready" and entry["pid"] == started["pid"]
    )
    return started["ts"], ready["ts"]
