"""The lifecycle journal `state/events.jsonl`: one JSON line per thing that happened to a process or a model."""

import contextlib
import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from protocol.logs import Field, event, json_line

_MAX_BYTES: Final = 10 * 1024 * 1024
#: Entries that are kept in memory for who asks what happened lately; 1,000 are about 300 KB.
MAX_RECENT: Final = 1000
_TAIL_BYTES: Final = 512 * 1024
Follower = Callable[[bytes], None]


class _When(msgspec.Struct):
    ts: float


class Journal:
    """Appends events; the file is turned over at 10 MB and one older file is kept. Never stops the service."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._torn = _ends_within_a_line(file)
        self._recent: deque[tuple[float, bytes]] = deque(_last_entries(file), maxlen=MAX_RECENT)
        self._followers: set[Follower] = set()

    def write(self, name: str, /, *, level: str = "INFO", **fields: Field) -> None:
        """Log an event and append it to the journal."""
        event(name, level=level, **fields)
        now = time.time()
        head: dict[str, object] = {"ts": now, "event": name}
        entry = json_line({**head, **fields, **head})
        self._recent.append((now, entry))
        for follower in tuple(self._followers):
            follower(entry)
        line = entry + b"\n"
        try:
            if self._file.exists() and self._file.stat().st_size > _MAX_BYTES:
                self._file.replace(self._file.with_name(self._file.name + ".1"))
            self._append(line)
        except OSError as error:
            event("journal_not_written", level="ERROR", reason=error.strerror)

    def recent(self, last: int, since: float) -> list[bytes]:
        """Return the newest entries as JSON, oldest first: at most `last`, written after `since` (Unix time)."""
        found = [entry for ts, entry in self._recent if ts > since]
        return found[max(0, len(found) - last) :]

    def follow(self, follower: Follower) -> None:
        """Hand each new entry to `follower`, which must not raise."""
        self._followers.add(follower)

    @contextlib.contextmanager
    def followed(self, follower: Follower) -> Iterator[None]:
        """Do so while the block runs."""
        self.follow(follower)
        try:
            yield
        finally:
            self._followers.discard(follower)

    def _append(self, line: bytes) -> None:
        # A full disk may take half a line; the next one must not be glued to it.
        data = b"\n" + line if self._torn else line
        try:
            with self._file.open("ab", buffering=0) as stream:
                written = stream.write(data)
        except OSError:
            self._torn = _ends_within_a_line(self._file)
            raise
        self._torn = bool(written) and written != len(data)
        if written != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def add_apart(file: Path, name: str, /, **fields: Field) -> None:
    """Append an entry from another process than the supervisor; raise `OSError`. One write, so it lands whole.

    Who follows the journal through the supervisor is not told of it.
    """
    head: dict[str, object] = {"ts": time.time(), "event": name}
    line = json_line({**head, **fields, **head}) + b"\n"
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.write(descriptor, b"\n" + line if _ends_within_a_line(file) else line)
    finally:
        os.close(descriptor)


def _last_entries(file: Path) -> Iterator[tuple[float, bytes]]:
    """Yield the entries at the end of the file with their times; what cannot be read is left out."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = stream.read(_TAIL_BYTES).splitlines()
    except OSError:
        return
    for line in lines[-MAX_RECENT:]:
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            yield msgspec.json.decode(line, type=_When).ts, line


def _ends_within_a_line(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.seek(0, os.SEEK_END) > 0 and stream.seek(-1, os.SEEK_END) >= 0 and stream.read(1) != b"\n"
    except OSError:
        return False
