"""Logs are JSON lines with known keys, never a prompt, a key or a local, and never a reason to fail (design, facts)."""

import datetime
import json
import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loguru import logger

from protocol import logs
from protocol.logs import event, exception_event, json_line, setup_logging

SECRET = "MARKER-of-a-prompt-7f3a"
HEAD = ["ts", "level", "process", "pid", "event"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "worker.log"


class Terminal:
    """All that went to stderr."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture
        self._text = ""

    def getvalue(self) -> str:
        self._text += self._capture.readouterr().err
        return self._text


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(capsys)


@pytest.fixture
def logging_on(file: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logging as a process sets it up; the test process's own is put back afterwards."""
    monkeypatch.setattr(logging.root, "handlers", [])
    level = logging.root.level
    setup_logging("worker:one", file=file, terminal=True, level="DEBUG")
    yield
    logger.remove()
    logger.configure(extra={})
    logging.root.setLevel(level)
    logger.add(sys.__stderr__ or sys.stderr)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def last(file: Path) -> dict[str, Any]:
    return lines(file)[-1]


pytestmark = pytest.mark.usefixtures("logging_on")


# -- what a line holds ----------------------------------------------------------------------------------------------


def test_every_line_is_json_with_the_documented_keys_first(file: Path) -> None:
    event("worker_ready", model="org/one", load_s=1.5, pinned=True, reason=None, count=3)
    (line,) = lines(file)
    assert list(line)[:5] == HEAD
    assert (line["level"], line["process"], line["pid"], line["event"]) == (
        "INFO",
        "worker:one",
        os.getpid(),
        "worker_ready",
    )
    assert datetime.datetime.fromisoformat(line["ts"]).tzinfo is not None
    assert {key: line[key] for key in list(line)[5:]} == {
        "model": "org/one",
        "load_s": 1.5,
        "pinned": True,
        "reason": None,
        "count": 3,
    }


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
def test_an_event_has_the_level_it_was_given(file: Path, level: str) -> None:
    event("something", level=level)
    assert last(file)["level"] == level


def test_events_below_the_level_are_left_out(file: Path) -> None:
    event("too_small", level="TRACE")
    event("debugging", level="DEBUG")
    assert [line["event"] for line in lines(file)] == ["debugging"]


def test_a_field_never_takes_the_place_of_the_writers_own(file: Path, terminal: Terminal) -> None:
    fields: dict[str, Any] = {
        "pid": 4242,
        "ts": "x",
        "level_": 1,
        "event": "y",
        "process": "z",
        "name": "n",
        "text": "t",
    }
    event("process_started", **fields)
    line = last(file)
    assert (line["pid"], line["event"], line["process"]) == (os.getpid(), "process_started", "worker:one")
    assert (line["about_pid"], line["about_event"], line["about_process"], line["about_ts"]) == (4242, "y", "z", "x")
    assert (line["name"], line["text"]) == ("n", "t")
    assert "pid=4242" in terminal.getvalue()
    assert "text=t" in terminal.getvalue()


def test_the_file_is_written_for_its_owner_alone_under_our_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        setup_logging("x", file=tmp_path / "other.log", terminal=False)
        event("hello")
    finally:
        os.umask(before)
    assert (tmp_path / "other.log").stat().st_mode & 0o077 == 0


# -- what a terminal shows ------------------------------------------------------------------------------------------


def test_a_terminal_line_is_readable(terminal: Terminal) -> None:
    event("worker_ready", level="WARNING", model="org/one", load_s=1.5, reason="three words here")
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d\.\d{3} WARNING worker:one worker_ready model=org/one load_s=1\.5 reason=three words here\n",
        terminal.getvalue(),
    )


def test_no_value_moves_the_cursor_breaks_the_line_or_changes_colours(terminal: Terminal) -> None:
    event("odd", a="one\ntwo", b="\x1b[31mred\x1b[0m", c="\r\x08\x00", d="\u202egnirts", e="grün 模型")
    text = terminal.getvalue()
    assert text.count("\n") == 1
    assert text.rstrip("\n").isprintable()
    assert "grün 模型" in text


# -- values that break format strings -------------------------------------------------------------------------------

ODD = [
    "{", "}", "{}", "{0}", "{extra}", "{extra[_json]}", "{{x}}", "{message!r:>99999999}", "%s %d %n", "\\N{DASH}",
    "<red>", "</red>", "<level>", "</>", "<dim>x</dim>", r"\<red>", "<fg #ffffff>", "a\nb", "a\r\nb", "\x00", "\x1b[2J",
    "\u2028", "\udc80", "\ud800\udc00", "é" * 10, "x" * 5_000_000, '"', "\\", "\\u0000", "", " ", "\ufeff",
]  # fmt: skip


@pytest.mark.parametrize("value", ODD, ids=lambda value: ascii(value)[:20])
def test_no_text_in_a_field_breaks_or_loses_a_line(file: Path, terminal: Terminal, value: str) -> None:
    event("odd_value", value=value, after="still here")
    exception_event("odd_failure", ValueError(value), value=value)
    odd, failure = lines(file)
    for line in (odd, failure):
        shown = value[:4096].encode("utf-8", "backslashreplace").decode()
        assert line["value"].startswith(shown)
        assert len(line["value"]) < 5000
    assert odd["after"] == "still here"
    assert "lost" not in terminal.getvalue()
    assert terminal.getvalue().count("\n") == 2


@pytest.mark.parametrize(
    "value",
    [b"\xff\x00", 2**63, 2**64, -(2**70), 10**5000, math.nan, math.inf, object(), {"a": {1, 2}}, [1, "x", b"\xff"], 1j],
    ids=lambda value: type(value).__name__,
)
def test_values_that_json_does_not_know_do_not_break_a_line(file: Path, terminal: Terminal, value: Any) -> None:
    event("odd_value", value=value, after="still here")
    assert last(file)["after"] == "still here"
    assert "lost" not in terminal.getvalue()
    assert "still here" in terminal.getvalue()


def test_an_object_is_named_by_its_type_because_its_text_may_be_anything(file: Path, terminal: Terminal) -> None:
    class Prompt:
        def __repr__(self) -> str:
            return SECRET

    value: Any = Prompt()
    event("odd_value", value=value)
    assert last(file)["value"] == "<Prompt>"
    assert SECRET not in terminal.getvalue()


@given(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.floats() | st.text(), max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_scalars_are_one_line_of_json(fields: dict[str, Any]) -> None:
    line = json_line(fields)
    assert b"\n" not in line
    assert isinstance(json.loads(line), dict)


@given(st.text(st.characters(blacklist_categories=()), max_size=40))
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_any_text_is_one_line_in_the_file_and_one_on_the_terminal(file: Path, terminal: Terminal, text: str) -> None:
    before = len(terminal.getvalue())
    event("any", value=text)
    assert last(file)["value"] == text.encode("utf-8", "backslashreplace").decode()
    assert terminal.getvalue()[before:].count("\n") == 1


# -- what never gets into a log -------------------------------------------------------------------------------------


def plain(secret: str) -> None:
    raise ValueError(secret)


def in_a_local(secret: str) -> None:
    prompt = {"content": secret}
    raise KeyError(len(prompt))


def in_a_cause(secret: str) -> None:
    try:
        plain(secret)
    except ValueError as error:
        raise RuntimeError("other words") from error


def in_a_context(secret: str) -> None:
    try:
        plain(secret)
    finally:
        in_a_local(secret)


def in_a_note(secret: str) -> None:
    error = RuntimeError()
    error.add_note(secret)
    raise error


def in_a_group(secret: str) -> None:
    raise ExceptionGroup(secret, [ValueError(secret)])


def in_a_decode_error(secret: str) -> None:
    (secret.encode() + b"\xff").decode()


def in_a_parser(secret: str) -> None:
    json.loads(f"[{secret}]")


def in_a_file_name(secret: str) -> None:
    Path(f"/nonexistent/{secret}").read_bytes()


def unprintable(secret: str) -> None:
    class UnprintableError(Exception):
        def __str__(self) -> str:
            raise OSError(secret)

        __repr__ = __str__

    raise UnprintableError


LEAKS = [plain, in_a_local, in_a_cause, in_a_context, in_a_note, in_a_group, in_a_decode_error, in_a_parser,
         in_a_file_name, unprintable]  # fmt: skip


@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: leak.__name__)
@pytest.mark.parametrize("through", ["exception_event", "stdlib", "uvicorn", "loguru", "asyncio"])
def test_an_exception_is_its_type_and_its_places_and_nothing_else(
    file: Path, terminal: Terminal, leak: Callable[[str], None], through: str
) -> None:
    try:
        leak(SECRET)
    except Exception as error:
        match through:
            case "exception_event":
                exception_event("request_crashed", error, request_id="req-1")
            case "stdlib":
                logging.getLogger("some.library").exception("failed on %s", SECRET)
            case "uvicorn":
                logging.getLogger("uvicorn.error").error(SECRET, exc_info=error)  # noqa: TRY400
            case "loguru":
                logger.exception("request_crashed")
            case "asyncio":
                logging.getLogger("asyncio").critical(SECRET, exc_info=(type(error), error, error.__traceback__))
    text = file.read_text() + terminal.getvalue()
    assert SECRET not in text
    assert "lost" not in text
    line = last(file)
    assert line["level"] == ("CRITICAL" if through == "asyncio" else "ERROR")
    assert line["exc_type"].rpartition(".")[2].endswith(("Error", "ExceptionGroup"))
    assert any(leak.__name__ in place for place in line["exc_at"])
    assert all(re.fullmatch(r"[\w.<>-]+:\d+:[\w<>]+", place) for place in line["exc_at"]), line["exc_at"]


def test_texts_of_libraries_are_left_out_and_their_place_is_named(file: Path) -> None:
    logging.getLogger("httpx").warning("POST %s", SECRET)
    line = last(file)
    assert (line["event"], line["logger"], line["level"]) == ("library_log", "httpx", "WARNING")
    assert re.fullmatch(r"test_logs:\d+", line["at"])
    assert SECRET not in file.read_text()
    count = len(lines(file))
    logging.getLogger("httpx").info("chatter")
    assert len(lines(file)) == count


@pytest.mark.parametrize("level", [5, 35, 60])
def test_levels_that_libraries_invent_do_no_harm(file: Path, level: int) -> None:
    logging.getLogger("odd").log(level, "text")
    assert all(line["event"] == "library_log" for line in lines(file))


def test_a_record_without_a_real_exception_does_no_harm(file: Path) -> None:
    logging.getLogger("odd").error("text", exc_info=True)
    assert "exc_type" not in last(file)


def test_a_disk_that_refuses_lines_costs_those_lines_and_tells_nobody_what_was_in_them(tmp_path: Path) -> None:
    program = f"""
import resource, sys
from pathlib import Path
from protocol.logs import event, exception_event, setup_logging
def f(prompt):
    raise ValueError(prompt)
setup_logging("x", file=Path(sys.argv[1]), terminal=True)
event("before")
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (Path(sys.argv[1]).stat().st_size + 20, hard))
for _ in range(100):
    try:
        try:
            f({SECRET!r})
        except ValueError as error:
            raise RuntimeError from error
    except RuntimeError as error:
        exception_event("while_full", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
event("after")
"""
    command = [sys.executable, "-c", program, str(tmp_path / "x.log")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert "a log line was lost: OSError File too large" in done.stderr
    assert done.stderr.count("while_full") == 100, "the terminal has them all the same"
    text = (tmp_path / "x.log").read_text()
    assert json.loads(text.splitlines()[0])["event"] == "before"
    assert json.loads(text.splitlines()[-1])["event"] == "after"
    assert SECRET not in done.stderr + text


def test_a_terminal_that_is_gone_does_not_keep_a_line_from_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gone in (None, open(os.devnull)):  # noqa: PTH123, SIM115
        monkeypatch.setattr(sys, "stderr", gone)
        event("still_logged")
        if gone is not None:
            gone.close()
            event("still_logged")
    assert len(lines(file)) == 3


@pytest.mark.parametrize("colours", [True, False])
def test_colours_are_for_terminals_only(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, colours: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    setup_logging("x", file=tmp_path / "x.log", terminal=True)
    event("coloured", value="<red>{}</red>")
    assert ("\x1b[" in terminal.getvalue()) == colours
    assert "value=<red>{}</red>" in terminal.getvalue()
    assert "\x1b" not in (tmp_path / "x.log").read_text()


def test_before_logging_is_set_up_an_exception_shows_no_message_and_no_local() -> None:
    program = f"""
from protocol.logs import exception_event
def f(prompt):
    raise ValueError(prompt)
try:
    f({SECRET!r})
except ValueError as error:
    exception_event("early", error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0
    assert "early" in done.stderr
    assert SECRET not in done.stderr


def test_a_recursion_without_end_is_logged_with_its_last_places(file: Path) -> None:
    def deeper() -> None:
        deeper()

    try:
        deeper()
    except RecursionError as error:
        exception_event("deep", error)
    assert last(file)["exc_type"] == "RecursionError"
    assert len(last(file)["exc_at"]) == 30
    assert last(file)["exc_at"][-1].endswith(":deeper")


# -- files ----------------------------------------------------------------------------------------------------------


def test_five_files_are_kept_and_no_line_is_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (logs.ROTATION, logs.RETENTION) == ("50 MB", 4)
    monkeypatch.setattr(logs, "ROTATION", "2 KB")
    folder = tmp_path / "logs"
    setup_logging("x", file=folder / "x.log", terminal=False)
    for number in range(200):
        event("counted", number=number, padding="x" * 100)
    kept = sorted(folder.iterdir(), key=lambda path: (path.name == "x.log", path.stat().st_mtime_ns, path.name))
    assert len(kept) == 5
    assert all(path.stat().st_size <= 2000 for path in kept)
    numbers = sorted(line["number"] for path in kept for line in lines(path))
    assert numbers == list(range(numbers[0], 200))


def test_what_was_logged_before_a_restart_is_kept(file: Path) -> None:
    event("before")
    setup_logging("worker:one", file=file, terminal=False)
    event("after")
    assert [line["event"] for line in lines(file)] == ["before", "after"]
