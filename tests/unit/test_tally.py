"""What the supervisor counts for the metrics, from its own journal."""

import json
from typing import Any

import pytest

from supervisor import tally
from supervisor.tally import Tally


def counted(*entries: dict[str, Any]) -> dict[tuple[str, str, str], int]:
    made = Tally()
    for entry in entries:
        made.hear(json.dumps({"ts": 1.0, **entry}).encode())
    return {(c["name"], c["model"], c["kind"]): c["value"] for c in made.document() if c["name"] != "lifecycle_events"}


def exited(exit_class: str, state: str = "ready", model: str = "m") -> dict[str, Any]:
    return {"event": "process_exited", "model": model, "exit_class": exit_class, "state": state}


STARTED = {"event": "process_started", "model": "m"}


def test_a_restart_has_the_class_of_the_end_before_it_and_a_load_is_none() -> None:
    found = counted(STARTED, exited("native_crash"), STARTED, exited("metal_oom"), STARTED)
    assert found["worker_restarts", "m", "native_crash"] == found["worker_restarts", "m", "metal_oom"] == 1
    assert found["worker_exits", "m", "native_crash"] == 1
    stopped = {"event": "model_readiness_changed", "model": "m", "state": "stopped"}
    assert ("worker_restarts", "m", "asked") not in counted(STARTED, exited("asked"), stopped, STARTED)
    assert counted(STARTED, exited("asked"), STARTED)["worker_restarts", "m", "asked"] == 1  # restart-worker


def test_a_canary_that_fails_before_ready_or_later_is_counted_and_an_unload_meanwhile_is_not() -> None:
    found = counted(exited("python_error", "warming"), exited("canary_mismatch"), exited("asked", "warming"))
    assert found["canary_failures", "m", ""] == 2


def test_quarantines_evictions_memory_and_administrators_are_counted() -> None:
    found = counted(
        {"event": "model_readiness_changed", "model": "m", "state": "quarantined"},
        {"event": "model_evicted", "model": "m"},
        {"event": "memory_kill", "model": "m"},
        {"event": "hung", "model": "m"},
        {"event": "admin_action", "model": "m", "action": "load"},
        exited("native_crash", model=""),
    )
    assert found == {
        ("quarantines", "m", ""): 1,
        ("evictions", "m", ""): 1,
        ("memory_kills", "m", ""): 1,
        ("hangs", "m", ""): 1,
        ("admin_actions", "", "load"): 1,
        ("gateway_exits", "", "native_crash"): 1,
    }


def test_no_line_stops_it_and_no_number_of_models_fills_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "_MAX_KINDS", 10)
    made = Tally()
    for line in (b"", b"{", b'{"event":7}', b"[]", b"\xff", b"[" * 5000):
        made.hear(line)
    for number in range(50):
        made.hear(json.dumps({"event": "model_evicted", "model": f"m{number}"}).encode())
    found = made.document()
    assert len(found) <= 12
    assert sum(count["value"] for count in found if count["name"] == "evictions") == 50
