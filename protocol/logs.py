"""Logging with loguru: flat JSON lines to one file per process, a readable line on a terminal.

An event is a stable name and scalar fields: `event("worker_ready", model=…)`. Exceptions are written as their type
and the places they passed, without message or locals, because either may hold a prompt or a key.
"""

import inspect
import logging
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

import msgspec
from loguru import logger

if TYPE_CHECKING:
    from loguru import Record

#: Rotation of each file: five files of 50 MB with the live one.
ROTATION: Final = "50 MB"
RETENTION: Final = 4
_MAX_FRAMES: Final = 30

Field = str | int | float | bool | None


def event(name: str, *, level: str = "INFO", **fields: Field) -> None:
    """Log one event. `name` is a constant; what varies goes into `fields`."""
    logger.bind(**fields).log(level, name)


def exception_event(name: str, error: BaseException, **fields: Field) -> None:
    """Log an exception that a boundary caught."""
    logger.bind(**fields).opt(exception=error).error(name)


def setup_logging(process: str, *, file: Path | None, terminal: bool, level: str = "INFO") -> None:
    """Send every event, also those of libraries that use `logging`, to `file` and, if asked, to stderr."""
    logger.remove()
    logger.configure(extra={"process_name": process})
    if file is not None:
        logger.add(
            file,
            format=_json_line,
            level=level,
            rotation=ROTATION,
            retention=RETENTION,
            backtrace=False,
            diagnose=False,
            catch=True,
        )
    if terminal:
        logger.add(sys.stderr, format=_terminal_line, level=level, backtrace=False, diagnose=False, catch=True)
    logging.basicConfig(handlers=[_Intercept()], level=logging.WARNING, force=True)


def _json_line(record: "Record") -> str:
    extra = dict(record["extra"])
    extra.pop("line", None)
    line: dict[str, Field | list[str]] = {
        "ts": record["time"].isoformat(timespec="milliseconds"),
        "level": record["level"].name,
        "process": extra.pop("process_name", ""),
        "pid": record["process"].id,
        "event": record["message"],
        **extra,
    }
    line.update(_exception_fields(record))
    record["extra"]["line"] = msgspec.json.encode(line, enc_hook=str).decode()
    return "{extra[line]}\n"


def _terminal_line(record: "Record") -> str:
    extra = {k: v for k, v in record["extra"].items() if k not in {"process_name", "line", "text"}}
    extra.update(_exception_fields(record))
    fields = " ".join(f"{key}={value}" for key, value in extra.items())
    record["extra"]["text"] = f"{record['message']} {fields}".rstrip()
    return "<dim>{time:HH:mm:ss.SSS}</dim> <level>{level: <7}</level> {extra[process_name]: <10} {extra[text]}\n"


def _exception_fields(record: "Record") -> dict[str, Field | list[str]]:
    caught = record["exception"]
    if caught is None or caught.type is None:
        return {}
    return {"exc_type": caught.type.__qualname__, "exc_at": _places(caught.traceback)}


def _places(traceback: TracebackType | None) -> list[str]:
    frames = [] if traceback is None else inspect.getinnerframes(traceback, context=0)
    return [f"{Path(frame.filename).name}:{frame.lineno}:{frame.function}" for frame in frames[-_MAX_FRAMES:]]


class _Intercept(logging.Handler):
    """Hands records of the standard library's logging to loguru, without their exception texts."""

    def emit(self, record: logging.LogRecord) -> None:
        known = {"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"}
        level = record.levelname if record.levelname in known else "INFO"
        caught = record.exc_info[1] if record.exc_info else None
        # A library's text may quote a request; its logger name and place say enough.
        logger.bind(logger=record.name, at=f"{record.module}:{record.lineno}").opt(exception=caught).log(
            level, "library_log"
        )
