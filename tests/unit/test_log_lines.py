"""The stable names of events, what becomes of models after a crash, and the last lines of all logs."""

import ast
import json
import os
from pathlib import Path

from gateway.logs_route import Wanted, last_lines
from protocol.paths import slot_name
from protocol.states import ModelState
from supervisor.children import trim_outputs
from supervisor.journal import Journal, add_apart
from supervisor.recovery import Recovery

PACKAGES = ("gateway", "worker", "supervisor")
#: People's alerts and scripts look for these.
STABLE = {
    "sigterm_received", "crash_loop_detected", "safe_mode_activated", "safe_mode_skip_auto_load",
    "runtime_state_saved", "runtime_state_load_failed", "crash_recovery_model_restored",
    "crash_recovery_model_failed", "semaphore_timeout", "semaphore_timeout_stream", "inference_complete",
    "metal_cache_cleared", "metal_cache_clear_failed", "metal_cache_maintenance_enabled",
    "model_readiness_changed",
}  # fmt: skip


def test_events_with_stable_names_are_written_somewhere() -> None:
    root = Path(__file__).resolve().parents[2]
    texts = {
        node.value
        for package in PACKAGES
        for path in (root / package).rglob("*.py")
        for call in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(call, ast.Call) and call.args
        for node in ast.walk(call.args[0])
        if isinstance(node, ast.Constant)
    }
    assert texts >= STABLE


def names(file: Path) -> list[tuple[str, object]]:
    return [(line["event"], line.get("model")) for line in map(json.loads, file.read_text().splitlines())]


def test_models_that_were_live_before_a_crash_are_written_down_when_they_are_back(tmp_path: Path) -> None:
    recovery = Recovery(Journal(tmp_path / "journal"))
    recovery.expect(["alpha", "beta"])
    for model, state in (
        ("alpha", ModelState.LOADING),
        ("alpha", ModelState.READY),
        ("alpha", ModelState.READY),
        ("beta", ModelState.BACKOFF),
        ("beta", ModelState.READY),
        ("gamma", ModelState.READY),
    ):
        recovery.on_state(model, state, "why")
    restored, failed = "crash_recovery_model_restored", "crash_recovery_model_failed"
    assert names(tmp_path / "journal") == [(restored, "alpha"), (failed, "beta"), (restored, "beta")]


def test_another_process_adds_a_whole_line_to_the_journal(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    journal = Journal(file)
    journal.write("one")
    with file.open("ab") as stream:
        stream.write(b'{"ts":1,"eve')  # a disk that was full
    add_apart(file, "two", name="bot")
    journal.write("three")
    events = [json.loads(line)["event"] for line in file.read_text().splitlines() if line.endswith("}")]
    assert events == ["one", "two", "three"]


def test_what_a_living_process_writes_is_bounded_and_it_writes_on(tmp_path: Path) -> None:
    output = tmp_path / "alpha.out"
    small = tmp_path / "beta.out"
    small.write_bytes(b"words")
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, b"x" * (10 * 1024 * 1024))
        trim_outputs(tmp_path)
        assert output.stat().st_size == 10 * 1024 * 1024
        os.write(descriptor, b"one more")
        trim_outputs(tmp_path)
        os.write(descriptor, b"afterwards")
    finally:
        os.close(descriptor)
    assert output.read_bytes() == b"afterwards"
    older = tmp_path / "alpha.out.1"
    assert older.read_bytes().endswith(b"one more")
    assert older.stat().st_mode & 0o077 == 0
    assert small.read_bytes() == b"words"


def line(ts: int, event: str, **fields: object) -> str:
    return json.dumps(
        {"ts": f"2027-01-01T00:00:{ts:02}", "level": "INFO", "process": "gateway", "event": event, **fields}
    )


def test_the_last_lines_of_all_logs_come_in_order_and_bad_ones_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "gateway.log").write_text("\n".join([line(1, "a"), "no json", line(3, "c"), '{"ts": 5', ""]))
    worker = [
        line(2, "b", process=f"worker:{slot_name('alpha')}", level="ERROR"),
        line(4, "d", process=f"worker:{slot_name('beta')}", model="beta"),
    ]
    (tmp_path / "alpha.log").write_text("\n".join(worker) + "\n\xff\n", encoding="latin-1")
    (tmp_path / "alpha.out").write_text(line(9, "raw"))
    (tmp_path / "link.log").symlink_to(tmp_path / "alpha.out")

    def found(count: int = 100, **wanted: str) -> str:
        return "".join(json.loads(raw)["event"] for raw in last_lines(tmp_path, Wanted(**wanted), count))

    assert found() == "abcd"
    assert found(2) == "cd"
    assert found(0) == ""
    assert found(level="WARNING") == "b"
    assert found(process="gateway") == "ac"
    assert found(process="worker") == "bd"
    assert (found(model="alpha"), found(model="beta")) == ("b", "d")


def test_only_the_end_of_a_large_file_is_read(tmp_path: Path) -> None:
    lines = [line(n % 60, "x", padding="p" * 1000) for n in range(1000)]
    (tmp_path / "gateway.log").write_text("\n".join([*lines, line(59, "end")]) + "\n")
    found = last_lines(tmp_path, Wanted(), 1000)
    assert 200 < len(found) < 300
    assert all(json.loads(raw)["event"] in {"x", "end"} for raw in found)
