"""Logging with loguru: flat JSON lines to one file per process, a readable line on a terminal.

An event is a stable name and scalar fields: `event("worker_ready", model=…)`. Exceptions are written as their type
and the places they passed, without message or locals, because either may hold a prompt or a key. Every line has `ts`,
`level`, `process`, `pid` and `event`, and these are always the writer's: a field of that name becomes `about_…`.
"""

import contextlib
import json
import logging
import os
import sys
import traceback
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import msgspec
from loguru import logger

from protocol.lines import escape_line_ends

if TYPE_CHECKING:
    from loguru import Record

#: Rotation of each file: five files of 50 MB with the live one.
ROTATION: Final = "50 MB"
RETENTION: Final = 4
_MAX_FRAMES: Final = 30
_MAX_TEXT: Final = 4096
#: Keys of `extra` with an underscore are ours: they carry finished text to loguru's format, which nothing in a value
#: can then reach.
_PROCESS: Final = "_process"
_JSON: Final = "_json"
_TEXT: Final = "_text"

Field = str | int | float | bool | None


def event(name: str, /, *, level: str = "INFO", **fields: Field) -> None:
    """Log one event. `name` is a constant; what varies goes into `fields`."""
    _log(level, name, fields)


def exception_event(name: str, error: BaseException, /, **fields: Field) -> None:
    """Log an exception that a boundary caught."""
    _log("ERROR", name, fields, error)


def setup_logging(process: str, *, file: Path | None, terminal: bool, level: str = "INFO") -> None:
    """Send every event, also those of libraries that use `logging`, to `file` and, if asked, to stderr."""
    logger.remove()
    logger.configure(extra={_PROCESS: process}, patcher=_without_exception)
    # With `catch` a sink that fails would print the exception being handled, message and all: `_log` catches instead.
    options: dict[str, Any] = {"level": level, "backtrace": False, "diagnose": False, "catch": False}
    if terminal:
        colours = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        logger.add(_to_terminal, format=_terminal_line, colorize=colours, **options)
    if file is not None:
        logger.add(file, format=_json_line, rotation=ROTATION, retention=RETENTION, **options)
    logging.basicConfig(handlers=[_Intercept()], level=logging.WARNING, force=True)


def json_line(fields: Mapping[str, object]) -> bytes:
    """Return fields as one line of JSON. Never fails: long text is cut, names of files that are not UTF-8 escaped."""
    plain = {_plain(key): _plain(value) for key, value in fields.items()}
    return escape_line_ends(msgspec.json.encode(plain, enc_hook=_describe))


def _log(level: str, name: str, fields: Mapping[str, Field], error: BaseException | None = None) -> None:
    try:
        logger.bind(**fields).opt(exception=error).log(level, name)
    except Exception as failure:  # noqa: BLE001 - a full disk must not stop what wanted to say something
        why = failure.strerror if isinstance(failure, OSError) else ""
        _to_terminal(f"a log line was lost: {type(failure).__name__} {why or ''}".rstrip() + "\n")


def _to_terminal(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # gone, closed, never there
        sys.stderr.write(text)
        sys.stderr.flush()


def _plain(value: object) -> object:
    kind = type(value)
    if kind is str and len(value) <= _MAX_TEXT and value.isascii():  # type: ignore[arg-type, attr-defined]
        return value
    if value is None or kind is bool or kind is float:
        return value
    if isinstance(value, list):
        return [_plain(item) for item in value[:_MAX_FRAMES]]
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return "a huge number"
    if not isinstance(value, str):
        return value
    text = value if len(value) <= _MAX_TEXT else f"{value[:_MAX_TEXT]}… ({len(value):,} characters)"
    return text.encode("utf-8", "backslashreplace").decode()


def _describe(value: object) -> str:
    return f"<{type(value).__name__}>"


def _json_line(record: "Record") -> str:
    extra = record["extra"]
    line: dict[str, object] = {
        "ts": record["time"].isoformat(timespec="milliseconds"),
        "level": record["level"].name,
        "process": extra.get(_PROCESS, ""),
        "pid": record["process"].id,
        "event": record["message"],
    }
    line |= {f"about_{key}" if key in line else key: value for key, value in _fields(extra).items()}
    extra[_JSON] = json_line(line).decode()
    return f"{{extra[{_JSON}]}}\n"


def _terminal_line(record: "Record") -> str:
    extra = record["extra"]
    fields = " ".join(f"{key}={_shown(value)}" for key, value in _fields(extra).items() if value not in ("", None))
    extra[_TEXT] = f"{extra.get(_PROCESS, ''): <10} {record['message']} {fields}".rstrip()
    return f"<dim>{{time:HH:mm:ss.SSS}}</dim> <level>{{level: <7}}</level> {{extra[{_TEXT}]}}\n"


def _fields(extra: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in extra.items() if not key.startswith("_")}


def _shown(value: object) -> str:
    """Return a value for a terminal: on one line, and without what would move the cursor or change colours."""
    text = str(_plain(value)) if isinstance(value, Field | list) else _describe(value)
    return text if text.isprintable() else json.dumps(text)


def _without_exception(record: "Record") -> None:
    """Reduce an exception to type and places before any sink sees it: a sink that fails prints its record whole."""
    caught = record["exception"]
    if caught is not None:
        record["exception"] = None
        if caught.type is not None:
            record["extra"].update(exc_type=caught.type.__qualname__, exc_at=_places(caught.traceback))


def _places(trace: TracebackType | None) -> list[str]:
    frames = deque(traceback.walk_tb(trace), maxlen=_MAX_FRAMES)
    return [f"{Path(frame.f_code.co_filename).name}:{line}:{frame.f_code.co_name}" for frame, line in frames]


class _Intercept(logging.Handler):
    """Hands records of the standard library's logging to loguru, without their exception texts."""

    def emit(self, record: logging.LogRecord) -> None:
        known = {"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"}
        level = record.levelname if record.levelname in known else "INFO"
        caught = record.exc_info[1] if record.exc_info else None
        # A library's text may quote a request; its logger name and place say enough.
        _log(level, "library_log", {"logger": record.name, "at": f"{record.module}:{record.lineno}"}, caught)


# Before `setup_logging` loguru prints to stderr, with locals.
logger.configure(patcher=_without_exception)
