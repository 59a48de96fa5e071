"""`GET /admin/logs`: the last lines of all log files of this home, as one JSON array, oldest first."""

import asyncio
import heapq
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
from starlette.types import Receive, Scope, Send

from gateway.admin_call import count, parameters, send_document, while_connected
from gateway.decode import bad
from protocol.errors import LmxError
from protocol.paths import slot_name

_LINES: Final = 100
_MAX_LINES: Final = 1000
#: What is looked at: of each file its end, and of many files those written last.
_TAIL_BYTES: Final = 256 * 1024
_MAX_FILES: Final = 64
_READERS: Final = 2
_LEVELS: Final = ("TRACE", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class _Line(msgspec.Struct):
    """What is looked at in a line."""

    ts: str
    level: str = ""
    process: str = ""
    model: str | None = None


class Wanted(msgspec.Struct, frozen=True):
    """Which lines are wanted: of this level or above, of this process (`gateway`, all `worker`s), about this model."""

    level: str = "TRACE"
    process: str = ""
    model: str = ""

    def takes(self, line: _Line) -> bool:
        """Return whether a line is wanted."""
        known = line.level in _LEVELS
        return (
            (not known or _LEVELS.index(line.level) >= _LEVELS.index(self.level))
            and (not self.process or f"{line.process}:".startswith(f"{self.process}:"))
            and (not self.model or self.model == line.model or line.process == f"worker:{slot_name(self.model)}")
        )


class Logs:
    """The endpoint."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._readers = asyncio.Semaphore(_READERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        values = parameters(scope, "n", "level", "process", "model")
        lines_wanted = count(values, "n", _LINES, _MAX_LINES)
        level = values.get("level", "TRACE").upper()
        if level not in _LEVELS:
            raise bad("level", f"must be one of {', '.join(_LEVELS)}")
        if self._folder is None:
            raise LmxError("not_found", "This gateway writes no log files.")
        wanted = Wanted(level, values.get("process", ""), values.get("model", ""))
        async with self._readers:
            lines = await while_connected(receive, asyncio.to_thread(last_lines, self._folder, wanted, lines_wanted))
        await send_document(send, b"[" + b",".join(lines) + b"]")


def last_lines(folder: Path, wanted: Wanted, count: int) -> list[bytes]:
    """Return the last lines that are wanted in all log files of a folder, oldest first; what is no line is left out."""
    found = ((line.ts, raw) for file in _newest(folder) for line, raw in _lines(file) if wanted.takes(line))
    return [raw for _, raw in sorted(heapq.nlargest(count, found))]


def _newest(folder: Path) -> list[Path]:
    dated: list[tuple[float, Path]] = []
    for entry in os.scandir(folder):
        try:
            if entry.name.endswith(".log") and entry.is_file(follow_symlinks=False):
                dated.append((entry.stat(follow_symlinks=False).st_mtime, Path(entry.path)))
        except OSError:
            continue  # rotated away meanwhile
    return [file for _, file in heapq.nlargest(_MAX_FILES, dated)]


def _lines(file: Path) -> Iterator[tuple[_Line, bytes]]:
    try:
        with file.open("rb") as stream:
            begin = max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES)
            stream.seek(begin)
            raw = stream.read(_TAIL_BYTES).split(b"\n")
    except OSError:
        return
    for each in raw[1:] if begin else raw:
        try:
            yield msgspec.json.decode(each, type=_Line), each
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue  # torn, or never one
