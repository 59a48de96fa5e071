"""The lifecycle journal `state/events.jsonl`: one JSON line per thing that happened to a process or a model."""

import time
from pathlib import Path
from typing import Final

import msgspec

from protocol.logs import Field, event

_MAX_BYTES: Final = 10 * 1024 * 1024


class Journal:
    """Appends events; the file is turned over at 10 MB and one older file is kept. Never stops the service."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def write(self, name: str, *, level: str = "INFO", **fields: Field) -> None:
        """Log an event and append it to the journal."""
        event(name, level=level, **fields)
        line = msgspec.json.encode({"ts": time.time(), "event": name, **fields}) + b"\n"
        try:
            if self._file.exists() and self._file.stat().st_size > _MAX_BYTES:
                self._file.replace(self._file.with_name(self._file.name + ".1"))
            with self._file.open("ab") as stream:
                stream.write(line)
        except OSError as error:
            event("journal_not_written", level="ERROR", reason=error.strerror)
