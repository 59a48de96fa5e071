"""Crash records: one folder per crash under `$LMX_HOME/crashes`, for operators, without a word of any prompt.

What a process wrote could hold anything: no worker prints prompts, but the message of an exception may quote what it
choked on, and people send tracebacks to models. So a line is kept only if all of it is known: messages of the crash
table, faulthandler's and Python's own lines, frames of installed code, exception types without their messages. In
place of every other line stands how long it was, which keeps the shape of the output and none of its contents.
"""

import contextlib
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import msgspec

from protocol.logs import event
from supervisor.exits import TRACEBACK, known_text, shown_type

CRASHES_SCHEMA: Final = "lmx.crashes/1"
#: Crashes that are kept, newest last to go.
MAX_CRASHES: Final = 100
MAX_STDERR_BYTES: Final = 8 * 1024
#: A dump of every thread's stack is longer than an error.
MAX_STACKS_BYTES: Final = 64 * 1024
MAX_SAMPLES: Final = 60
MAX_REQUESTS: Final = 256
#: Raw output that is looked at: blanking shortens it.
MAX_RAW_BYTES: Final = 64 * 1024

_MAX_RECORD_BYTES: Final = 1024 * 1024
_MAX_LINE: Final = 2000
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


@dataclass(eq=False)
class BlackBox:
    """What is noted of one living process, to be read when it ends. Make it just before the process is started."""

    #: The file that its stdout and stderr are appended to, and where this process's part of it begins.
    output: Path
    begins: int = 0
    #: Monotonic and Unix time of its start, or of its adoption.
    since: float = field(default_factory=time.monotonic)
    since_unix: float = field(default_factory=time.time)
    samples: deque[tuple[float, int | None]] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))

    def __post_init__(self) -> None:
        self.begins = start_of(self.output)

    def weigh(self, now: float, used: int | None) -> None:
        """Note the memory it occupies at a monotonic time, None if it could not be measured."""
        self.samples.append((now, used))

    def tail(self) -> str:
        """Return the end of what it wrote, as it wrote it: to be compared with what is known, never to be shown."""
        return tail_of(self.output, self.begins)

    def memory(self, now: float) -> tuple[tuple[float, int | None], ...]:
        """Return the last samples with their age in seconds."""
        return tuple((round(max(0.0, now - at), 3), used) for at, used in self.samples)


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


# -- what a process wrote -----------------------------------------------------------------------------------------


def start_of(file: Path) -> int:
    """Return how long an output file is: what the process to be started writes comes after it."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def tail_of(file: Path, since_offset: int, limit: int = MAX_RAW_BYTES) -> str:
    """Return the last `limit` bytes that were written after `since_offset`, whole lines only; "" if unreadable.

    A file that is shorter than the offset was turned over in between: all of it is new.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            start = since_offset if since_offset <= size else 0
            begin = max(start, size - limit)
            stream.seek(begin)
            data = stream.read(limit)
    except OSError:
        return ""
    if begin > start:
        data = data.partition(b"\n")[2]
    return data.decode(errors="replace")


_ANSI: Final = re.compile(r"\x1b\[[0-9;?]{0,16}[A-Za-z]")
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]+")

#: Lines of Python and of the C library that say nothing but what they are.
_WHOLE: Final = re.compile(
    r"(?:"
    r"During handling of the above exception, another exception occurred:"
    r"|The above exception was the direct cause of the following exception:"
    r"|Fatal Python error: (?:Aborted|Segmentation fault|Bus error|Illegal instruction|Floating point exception)"
    r"|(?:Current thread|Thread) 0x[0-9a-f]{1,16} \(most recent call first\):"
    r"|(?:Segmentation fault(?: \(core dumped\))?|Aborted(?: \(core dumped\))?|Abort trap: 6|Killed(?:: 9)?|Bus error)"
    r"|terminate called after throwing an instance of '[A-Za-z_:]{1,60}'"
    r"|terminate called (?:without an active exception|recursively)"
    r"|  <no Python frame>|  \.\.\."
    r"|[ ~^]{1,200}"
    r"|usage: python -m worker SPEC\.json"
    r"|<line of \d{1,9} characters>"
    r"|Exception in thread:"
    r"|Assertion failed: <message of \d{1,9} characters> \([a-z_]{1,40}\.[ch]pp:\d{1,6}\)"
    r")"
)
_BLANKED: Final = re.compile(r"<message of \d{1,9} characters>")
#: A frame: path, line, function. Shown from the last folder on that tells installed code from a person's own.
_FRAME: Final = re.compile(
    r'  File "([^"]{1,400})", line (\d{1,7})(?:,)? in ([A-Za-z_][A-Za-z0-9_.]{0,100}|<\w{1,20}>)'
)
_CODE_ROOTS: Final = re.compile(
    r"(?:.*/)?(?:site-packages|dist-packages|lib/python3\.\d{1,2})/([A-Za-z0-9_./-]{1,200}\.pyx?)"
    r"|(?:.*/)?((?:worker|gateway|supervisor|protocol|tests/fault|zmq)/[A-Za-z0-9_/]{1,100}\.pyx?)"
    r"|(<frozen [a-z_.]{1,40}>|<string>)"
)
_LIBCXX: Final = re.compile(
    r"libc\+\+abi: terminating"
    r"(?: (?:due to|with) uncaught exception of type [A-Za-z_0-9]{1,40}(?:::[A-Za-z_0-9]{1,40}){0,5})?"
)
_ASSERTION: Final = re.compile(r"\((?:[a-z_]{1,20}/){0,8}([a-z_]{1,40}\.[ch]pp:\d{1,6})\)$")


def safe_tail(text: str, limit: int) -> str:
    """Return the last `limit` bytes of a process's output as it may be kept: see the head of this module."""
    kept: list[str] = []
    size = 0
    for line in reversed(_ANSI.sub("", text[-MAX_RAW_BYTES:]).split("\n")):
        shown = _safe_line(_CONTROLS.sub("", line))
        size += len(shown.encode()) + 1
        if size > limit:
            break
        kept.append(shown)
    return "\n".join(reversed(kept))


def _safe_line(line: str) -> str:
    if not line.strip():
        return ""
    whole = line[:_MAX_LINE]
    if whole == TRACEBACK or _WHOLE.fullmatch(whole):
        return whole
    frame = _FRAME.fullmatch(whole)
    if frame is not None:
        return _safe_frame(line, frame)
    if whole.strip().startswith("Exception in thread"):
        return "Exception in thread:"
    prefix = _prefix(whole)
    known = known_text(whole[len(prefix) :])
    if known or prefix:
        return ": ".join(part for part in (prefix, known or _message(line[len(prefix) :])) if part)
    assertion = _ASSERTION.search(whole) if whole.startswith("Assertion failed: ") else None
    if assertion is not None:
        return f"Assertion failed: {_message(line[18 : assertion.start()])} ({assertion.group(1)})"
    return f"<line of {len(line)} characters>"


def _prefix(line: str) -> str:
    """Return the head of a line that says who failed: an exception type, or libc++abi and a C++ type."""
    native = _LIBCXX.match(line)
    if native is not None:
        return native.group()
    head, colon, _ = line.partition(":")
    return shown_type(head) if colon or head == line else ""


def _safe_frame(line: str, frame: re.Match[str]) -> str:
    path, number, function = frame.groups()
    root = _CODE_ROOTS.fullmatch(path)
    if root is None:
        return f"<line of {len(line)} characters>"
    comma = "," if f'", line {number},' in line else ""
    return f'  File "{next(part for part in root.groups() if part)}", line {number}{comma} in {function}'


def _message(text: str) -> str:
    text = text.removeprefix(":").strip()
    if not text or _BLANKED.fullmatch(text):
        return text  # a second pass changes nothing
    return f"<message of {len(text)} characters>"


_DUMP_HEAD: Final = re.compile(r"(?:Current thread|Thread) 0x[0-9a-f]{1,16} ")


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


def stacks_in(text: str) -> str:
    """Return the newest dump of all threads' stacks (faulthandler) in a process's output, "" if there is none."""
    lines = text.split("\n")
    heads = [at for at, line in enumerate(lines) if _DUMP_HEAD.match(line)]
    if not heads:
        return ""
    end = heads[-1] + 1
    while end < len(lines) and lines[end].startswith("  "):
        end += 1
    start = heads[-1]
    while start and _of_a_dump(lines[start - 1]):
        start -= 1
    return "\n".join(lines[start:end]).strip("\n")


def _of_a_dump(line: str) -> bool:
    return not line.strip() or line.startswith("  ") or _DUMP_HEAD.match(line) is not None


def versions() -> dict[str, str]:
    """Return the versions that matter to a crash, as far as they can be learnt without importing anything."""
    found = {}
    for name in ("lmx", "mlx", "mlx-lm", "pyzmq"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
