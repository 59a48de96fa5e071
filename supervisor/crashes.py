"""Crash records: one folder per crash under `$LMX_HOME/crashes`, for operators, without a word of any prompt."""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import msgspec

from protocol.logs import event
from supervisor.blackbox import MAX_SAMPLES
from supervisor.output import safe_tail

CRASHES_SCHEMA: Final = "lmx.crashes/1"
#: Crashes that are kept, newest last to go.
MAX_CRASHES: Final = 100
MAX_STDERR_BYTES: Final = 8 * 1024
#: A dump of every thread's stack is longer than an error.
MAX_STACKS_BYTES: Final = 64 * 1024
MAX_REQUESTS: Final = 256

_MAX_RECORD_BYTES: Final = 1024 * 1024
_ID: Final = re.compile(r"\d{8}T\d{6}-[A-Za-z0-9._-]{1,60}-\d{1,19}(?:\.\d)?")
_RECORD: Final = "record.json"
_STDERR: Final = "stderr.txt"
_STACKS: Final = "stacks.txt"
_REQUEST_ID: Final = re.compile(r"[^A-Za-z0-9._:-]+")


class UnknownCrashError(Exception):
    """No crash has this id, or several have; the text says so."""


class CrashRecord(msgspec.Struct, frozen=True):
    """Everything kept of one crash. `at` is Unix time; `memory` (seconds before the end, bytes or None if unknown)."""

    id: str
    model: str
    slot: str
    incarnation: int
    pid: int
    at: float
    kind: str = msgspec.field(name="class")
    words: str
    hint: str = ""
    code: int | None = None
    signal: str | None = None
    phase: str = ""
    step: int = 0
    uptime_s: float = 0.0
    memory: tuple[tuple[float, int | None], ...] = ()
    #: Trace ids of the requests it was working on.
    requests: tuple[str, ...] = ()
    #: In a file of its own on disk.
    stderr_tail: str = ""
    #: Name of the file with the stacks of its threads, "" if no dump was made.
    stacks: str = ""
    versions: Mapping[str, str] = msgspec.field(default_factory=dict)
    degraded: bool = False


def crash_id(at: float, slot: str, incarnation: int) -> str:
    """Return the id of a crash: its time in UTC, the slot and the incarnation."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(at))}-{slot}-{incarnation}"


class CrashStore:
    """The folder of crashes. Only the supervisor writes; a full or broken disk costs the record, never the service."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, record: CrashRecord, *, stacks: str = "") -> CrashRecord | None:
        """Write a crash, bounded and blanked, and drop the oldest; return what was written, None if it was not."""
        record = _bounded(msgspec.structs.replace(record, id=self._free(record.id)), stacks=bool(stacks))
        temporary = self._folder / f".tmp-{os.getpid()}-{record.incarnation}"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sweep()
            temporary.mkdir(mode=0o700)
            _write(temporary / _RECORD, _encode(record))
            _write(temporary / _STDERR, record.stderr_tail.encode())
            if stacks:
                _write(temporary / _STACKS, safe_tail(stacks, MAX_STACKS_BYTES).encode())
            temporary.rename(self._folder / record.id)
            self._prune(record.id)
        except (OSError, ValueError) as error:  # ValueError: a name that is no Unicode
            _not_written(record, error)
            shutil.rmtree(temporary, ignore_errors=True)
            return None
        return record

    def rewrite(self, record: CrashRecord) -> None:
        """Replace the record of a crash that is there: the system's own report came later than the crash."""
        folder = self._folder / record.id
        temporary = folder / f".{_RECORD}"
        try:
            _write(temporary, _encode(_bounded(record, stacks=bool(record.stacks))))
            temporary.replace(folder / _RECORD)
        except (OSError, ValueError) as error:
            _not_written(record, error)

    def ids(self) -> list[str]:
        """Return the ids of all crashes, newest first."""
        try:
            names = [entry.name for entry in os.scandir(self._folder) if entry.is_dir(follow_symlinks=False)]
        except OSError:
            return []
        return sorted((name for name in names if _ID.fullmatch(name)), reverse=True)

    def records(self) -> list[CrashRecord]:
        """Return every readable crash, newest first, without its output."""
        found = (self._load(name) for name in self.ids())
        return [record for record in found if record is not None]

    def read(self, wanted: str) -> CrashRecord:
        """Return the crash with this id, or the only one whose id begins so; raise `UnknownCrashError`."""
        names = self.ids()
        matching = [wanted] if wanted in names else [name for name in names if name.startswith(wanted)]
        if len(matching) > 1:
            msg = f"{len(matching)} crashes begin with {wanted!r:.80}: {', '.join(matching[:5])}"
            raise UnknownCrashError(msg)
        record = self._load(matching[0]) if matching else None
        if record is None:
            msg = f"there is no readable crash {wanted!r:.80}; list them with: lmx-supervisor crashes"
            raise UnknownCrashError(msg)
        return msgspec.structs.replace(record, stderr_tail=self._text(record.id, _STDERR, MAX_STDERR_BYTES))

    def stacks(self, record: CrashRecord) -> str:
        """Return the dump of the stacks that belongs to a crash, "" if there is none."""
        return self._text(record.id, _STACKS, MAX_STACKS_BYTES) if record.stacks else ""

    def _load(self, name: str) -> CrashRecord | None:
        try:
            data = _read(self._folder / name / _RECORD, _MAX_RECORD_BYTES)
            record = msgspec.json.decode(data, type=CrashRecord)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        # The folder's name is what finds it again.
        return msgspec.structs.replace(record, id=name)

    def _text(self, name: str, file: str, limit: int) -> str:
        try:
            return _read(self._folder / name / file, limit).decode(errors="replace")
        except OSError:
            return ""

    def _free(self, name: str) -> str:
        """Return an id that is not taken; the clock may have gone back."""
        names = (name, *(f"{name}.{number}" for number in range(2, 10)))
        return next((free for free in names if not (self._folder / free).exists()), name)

    def _sweep(self) -> None:
        for left in self._folder.glob(".tmp-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _prune(self, newest: str) -> None:
        # The one just written stays, whatever the clock says.
        for name in [name for name in self.ids() if name != newest][MAX_CRASHES - 1 :]:
            shutil.rmtree(self._folder / name, ignore_errors=True)


def _bounded(record: CrashRecord, *, stacks: bool) -> CrashRecord:
    return msgspec.structs.replace(
        record,
        memory=tuple(record.memory[-MAX_SAMPLES:]),
        requests=tuple(_REQUEST_ID.sub("_", request)[:64] for request in record.requests[:MAX_REQUESTS]),
        stderr_tail=safe_tail(record.stderr_tail, MAX_STDERR_BYTES),
        stacks=_STACKS if stacks else "",
    )


def _not_written(record: CrashRecord, error: Exception) -> None:
    reason = error.strerror if isinstance(error, OSError) else type(error).__name__
    event("crash_not_written", level="ERROR", slot=record.slot, incarnation=record.incarnation, reason=reason)


def _encode(record: CrashRecord) -> bytes:
    fields = msgspec.to_builtins(msgspec.structs.replace(record, stderr_tail=""))
    return msgspec.json.format(msgspec.json.encode({"schema": "lmx.crash/1", **fields})) + b"\n"


def _write(file: Path, data: bytes) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        written = os.write(descriptor, data)
        while written < len(data):  # a full disk gives a short write first
            written += os.write(descriptor, data[written:])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(file: Path, limit: int) -> bytes:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read(limit)


def document(store: CrashStore, wanted: str) -> dict[str, Any]:
    """Return the document lmx.crashes/1: every crash, or the one whose id is, or begins with, `wanted`.

    Raises `UnknownCrashError`.
    """
    if not wanted:
        return {"schema": CRASHES_SCHEMA, "crashes": [_plain(record) for record in store.records()]}
    record = store.read(wanted)
    more = {"stderr": record.stderr_tail, "stacks": store.stacks(record) or None}
    return {"schema": CRASHES_SCHEMA, "crash": {**_plain(record), **more}}


def _plain(record: CrashRecord) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(record)
    del fields["stderr_tail"], fields["stacks"]
    fields["has_stacks"] = bool(record.stacks)
    return fields


def versions() -> dict[str, str]:
    """Return the versions that matter to a crash, as far as they can be learnt without importing anything."""
    found = {}
    for name in ("lmx", "mlx", "mlx-lm", "pyzmq"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
