"""The lifecycle journal `state/events.jsonl`: one JSON line per thing that happened to a process or a model."""

import errno
import os
import time
from pathlib import Path
from typing import Final

from protocol.logs import Field, event, json_line

_MAX_BYTES: Final = 10 * 1024 * 1024


class Journal:
    """Appends events; the file is turned over at 10 MB and one older file is kept. Never stops the service."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._torn = _ends_within_a_line(file)

    def write(self, name: str, /, *, level: str = "INFO", **fields: Field) -> None:
        """Log an event and append it to the journal."""
        event(name, level=level, **fields)
        head: dict[str, object] = {"ts": time.time(), "event": name}
        line = json_line({**head, **fields, **head}) + b"\n"
        try:
            if self._file.exists() and self._file.stat().st_size > _MAX_BYTES:
                self._file.replace(self._file.with_name(self._file.name + ".1"))
            self._append(line)
        except OSError as error:
            event("journal_not_written", level="ERROR", reason=error.strerror)

    def _append(self, line: bytes) -> None:
        # A full disk may take half a line; the next one must not be glued to it.
        data = b"\n" + line if self._torn else line
        self._torn = True
        with self._file.open("ab", buffering=0) as stream:
            if stream.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._torn = False


def _ends_within_a_line(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.seek(0, os.SEEK_END) > 0 and stream.seek(-1, os.SEEK_END) >= 0 and stream.read(1) != b"\n"
    except OSError:
        return False
