"""What operators read is true, short and for people; what is not known is not made up."""

import io
import sys
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import control
from protocol.states import ModelState
from supervisor.progress import show_progress
from supervisor.screen import duration, size, status_text


def model(**changes: Any) -> dict[str, Any]:
    return {
        "id": "org/one",
        "state": "ready",
        "pid": 4242,
        "incarnation": 7,
        "restarts": 0,
        "last_exit": None,
        "memory_bytes": 500 * 1024**2,
        "reason": None,
        "retry_in_s": None,
        "progress": {"done_bytes": 0, "total_bytes": 0},
        "running": 2,
        "waiting": 1,
        "heartbeat_late": False,
        **changes,
    }


def document(*models: dict[str, Any], supervisor: dict[str, Any] | None = None, gateway: Any = ...) -> dict[str, Any]:
    default = {
        "pid": 12,
        "state": "ready",
        "url": "http://127.0.0.1:1234",
        "restarts": 0,
        "last_exit": None,
    }
    return {
        "schema": "lmx.status/1",
        "supervisor": {
            "pid": 11,
            "uptime_s": 3725.2,
            "state_durable": True,
            "state_problem": None,
            **(supervisor or {}),
        },
        "gateway": default if gateway is ... else gateway,
        "models": list(models),
    }


def row(**changes: Any) -> list[str]:
    """The cells of one model's line."""
    heading, line = status_text(document(model(**changes))).splitlines()[3:5]
    names = ["MODEL", "STATE", "PID", "INC", "RESTARTS", "MEM", "PREDICTED", "RUN", "WAIT", "LAST EXIT"]
    places = [heading.index(name) for name in names]
    return [line[a:b].strip() for a, b in zip(places, [*places[1:], None], strict=True)]


# -- numbers in words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (None, "?"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (540_000_000, "515.0 MiB"),
        (64 * 1024**3, "64.0 GiB"),
        (3 * 1024**4, "3.0 TiB"),
        (5000 * 1024**4, "5000.0 TiB"),
    ],
)
def test_sizes_are_binary_with_their_unit_and_unknown_is_not_zero(count: int | None, words: str) -> None:
    assert size(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (86399, "23 h 59 min"),
        (86400, "1 d 0 h"),
        (100 * 86400, "100 d 0 h"),
        (-5, "0 s"),
    ],
)
def test_durations_have_at_most_two_units_and_a_clock_set_back_shows_none_below_zero(
    seconds: float, words: str
) -> None:
    assert duration(seconds) == words


@given(st.integers(0, 2**70))
def test_any_size_is_short(count: int) -> None:
    assert len(size(count)) < 20


# -- the table ------------------------------------------------------------------------------------------------------


def test_supervisor_and_gateway_have_a_line_each() -> None:
    first, second, *_ = status_text(document()).splitlines()
    assert first == "supervisor  pid 11, up 1 h 2 min"
    assert second == "gateway     pid 12, ready, http://127.0.0.1:1234"


def test_a_ready_model_has_one_line_of_what_matters() -> None:
    assert row() == ["org/one", "ready", "4242", "#7", "0", "500.0 MiB", "-", "2", "1", "-"]


def test_unknown_memory_is_a_question_mark_and_no_process_has_none() -> None:
    assert row(memory_bytes=None)[5] == "?"
    assert row(memory_bytes=0)[5] == "0 B"
    assert row(pid=None, memory_bytes=None)[2:6] == ["-", "#7", "0", "-"]
    assert row(running=None, waiting=None)[6:8] == ["-", "-"]
    assert row(incarnation=0)[3] == "-"


@pytest.mark.parametrize("state", [state.value for state in ModelState])
def test_every_state_is_shown_by_its_name(state: str) -> None:
    assert row(state=state)[1].startswith(state)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state": "loading", "progress": {"done_bytes": 1, "total_bytes": 3}}, "loading 33 %"),
        ({"state": "loading", "progress": {"done_bytes": 3, "total_bytes": 3}}, "loading 100 %"),
        ({"state": "loading", "progress": {"done_bytes": 4, "total_bytes": 3}}, "loading 100 %"),
        ({"state": "loading", "progress": {"done_bytes": 0, "total_bytes": 0}}, "loading"),
        ({"state": "backoff", "retry_in_s": 14.6, "pid": None}, "backoff 15 s"),
        ({"state": "backoff", "retry_in_s": None, "pid": None}, "backoff"),
        ({"state": "ready", "heartbeat_late": True}, "ready (late)"),
        ({"state": "ready", "degraded": True}, "ready (degraded)"),
    ],
)
def test_a_state_says_how_far_or_how_long(changes: dict[str, Any], words: str) -> None:
    assert row(**changes)[1] == words


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"class": "native_crash", "signal": "SIGABRT", "code": None}, "native_crash SIGABRT, 5 s ago"),
        ({"class": "load_error", "signal": None, "code": 65}, "load_error exit 65, 5 s ago"),
        ({"class": "ended", "signal": None, "code": 0}, "ended exit 0, 5 s ago"),
        ({"class": "lost", "signal": None, "code": None}, "lost, 5 s ago"),
    ],
)
def test_the_last_exit_says_class_how_and_when(
    monkeypatch: pytest.MonkeyPatch, record: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1005.5)
    assert row(last_exit={**record, "reason": "words", "at": 1000.0})[9] == words


def test_an_exit_in_the_future_of_a_clock_set_back_is_just_now() -> None:
    record = {"class": "lost", "signal": None, "code": None, "reason": "", "at": time.time() + 1000}
    assert row(last_exit=record)[9] == "lost, 0 s ago"


def test_columns_line_up_for_ids_of_any_length() -> None:
    lines = status_text(document(model(id="a"), model(id="organisation/a-much-longer-name"))).splitlines()[3:]
    assert len({line.index(word) for line, word in zip(lines, ["PID", "4242", "4242"], strict=True)}) == 1
    assert all(line == line.rstrip() for line in lines)


def test_a_model_set_aside_has_its_reason_and_the_way_out_below() -> None:
    text = status_text(document(model(state="quarantined", pid=None, reason="3 failures in a row before it was ready")))
    assert "org/one was set aside: 3 failures in a row before it was ready" in text
    assert "lmx-supervisor reset org/one" in text
    probed = status_text(document(model(state="quarantined", reason="why", probe_in_s=61.0)))
    assert "tried again by itself in 1 min 1 s" in probed


def test_a_reason_is_one_short_printable_line() -> None:
    reason = "first\nsecond \x1b[31mred\x1b[0m \u202e" + "x" * 1000
    lines = status_text(document(model(state="quarantined", reason=reason))).splitlines()
    (note,) = [line for line in lines if "set aside" in line]
    assert "first second ?[31mred?[0m ?xxx" in note
    assert note.isprintable()
    assert len(note) < 220


def test_without_models_it_says_how_to_get_one() -> None:
    assert "lmx-supervisor load smollm2-135m-instruct" in status_text(document())


def test_state_that_is_not_durable_is_said_in_capitals_with_the_reason() -> None:
    text = status_text(document(supervisor={"state_durable": False, "state_problem": "No space left on device"}))
    assert "STATE NOT DURABLE: No space left on device" in text
    assert "NOT DURABLE" not in status_text(document())


def test_safe_mode_and_the_breaker_are_said_in_capitals_with_the_way_out() -> None:
    text = status_text(document(supervisor={"safe_mode": "3 starts within 60 s", "host_breaker_open_s": 31.0}))
    assert "SAFE MODE: 3 starts within 60 s" in text
    assert "lmx-supervisor resume" in text
    assert "HOST BREAKER open 31 s" in text


def test_a_gateway_that_is_not_there_not_listening_or_restarted_is_shown_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "gateway" not in status_text(document(gateway=None))
    monkeypatch.setattr(time, "time", lambda: 1061.5)
    record = {"class": "native_crash", "signal": "SIGSEGV", "code": None, "reason": "", "at": 1000.0}
    gateway = {"pid": None, "state": "backoff", "url": "", "restarts": 3, "last_exit": record}
    line = status_text(document(gateway=gateway)).splitlines()[1]
    assert line == "gateway     backoff, not listening, restarts 3, last native_crash SIGSEGV, 1 min 1 s ago"


# -- progress -------------------------------------------------------------------------------------------------------


def shown(*reports: control.Progress) -> None:
    with show_progress() as show:
        for report in reports:
            show(report)


def test_away_from_a_terminal_progress_is_a_line_for_each_state_and_each_tenth(
    capsys: pytest.CaptureFixture[str],
) -> None:
    total = 100 * 1024**2
    shown(
        control.Progress("one", ModelState.STARTING, 0, 0),
        *(control.Progress("one", ModelState.LOADING, n * 1024**2, total) for n in range(101)),
        control.Progress("one", ModelState.BACKOFF, 0, 0, "crashed"),
    )
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "one: starting"
    assert lines[1] == "one: loading 0 B of 100.0 MiB"
    assert lines[-2] == "one: loading 100.0 MiB of 100.0 MiB"
    assert lines[-1] == "one: backoff (crashed)"
    assert len(lines) == 13


def test_on_a_terminal_progress_is_a_bar_that_survives_any_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    shown(
        control.Progress("one", ModelState.STARTING, 0, 0),
        control.Progress("one", ModelState.WARMING, 2, 2),
        control.Progress("one", ModelState.LOADING, 3, 2, "[/red] {odd} [markup"),
    )
    assert capsys.readouterr().out == ""
    assert "[/red] {odd} [markup" in screen.getvalue()
