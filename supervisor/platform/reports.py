"""Reports the system writes about processes and panics: parsers of their text, and a bounded look at their folders.

macOS only: Linux has none, and every function then finds nothing. A report is written some seconds after the event, so
look again later before believing that there is none. The shapes were taken from published samples (tests/corpus).
"""

import datetime
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from supervisor.exits import known_panic

#: A JetsamEvent lists every process of the machine: 900 of them are half a megabyte.
MAX_REPORT_BYTES: Final = 4 * 1024 * 1024
#: Reports of one kind that are opened, newest first.
MAX_REPORTS: Final = 20
_MAX_ENTRIES: Final = 20_000
_MAX_PANIC_TEXT: Final = 300

_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
#: "2026-06-14 15:08:19.00 -0600"; the fraction has any number of digits, and may be missing.
_STAMP: Final = re.compile(r"(\d{4}-\d{2}-\d{2}) (\d{2}:\d{2}:\d{2})(?:\.\d{1,9})? ([+-]\d{4})")
#: In the text of a panic: seconds since 1970, in hexadecimal.
_CALENDAR: Final = re.compile(r"^\s{0,8}Calendar\s{0,4}: 0x([0-9a-f]{8,16}) ", re.MULTILINE)
_PANIC_LINE: Final = re.compile(r"panic\(cpu \d{1,4} caller 0x[0-9a-fA-F]{1,16}\): ?")
_TASK: Final = re.compile(r"^Panicked task [^\n]{0,200}\bpid (\d{1,10}):", re.MULTILINE)


class PanicReport(msgspec.Struct, frozen=True):
    """A kernel panic. `at`: Unix time, None if the report does not say. `pid`: whose thread it was, 0 if unknown."""

    at: float | None
    text: str
    #: What is known of such a panic, "" if nothing is.
    words: str = ""
    kind: str = "other"
    pid: int = 0


class JetsamReport(msgspec.Struct, frozen=True):
    """Processes that the system killed for memory: pid to reason. `at`: Unix time, None if it does not say."""

    at: float | None
    killed: dict[int, str]


# -- parsers: any text in, nothing raised ---------------------------------------------------------------------------


def jetsam_report(text: str) -> JetsamReport | None:
    """Return what a JetsamEvent report says, None if it is none.

    It lists every process of the machine. Killed are those with a reason or a kill time; the one that it names as the
    largest often is not.
    """
    header, body = _objects(text)
    processes = body.get("processes")
    if not isinstance(processes, list) or not ("memoryStatus" in body or "largestProcess" in body):
        return None
    killed = {
        entry["pid"]: _clean(str(entry.get("reason", "")), 60)
        for entry in processes[:_MAX_ENTRIES]
        if isinstance(entry, dict) and isinstance(entry.get("pid"), int) and ("reason" in entry or "killDelta" in entry)
    }
    return JetsamReport(_time(header.get("timestamp")) or _time(body.get("date")), killed)


def jetsam_pids(text: str) -> frozenset[int]:
    """Return the pids that a JetsamEvent report says were killed."""
    report = jetsam_report(text)
    return frozenset() if report is None else frozenset(report.killed)


def panic_time_and_text(text: str) -> PanicReport | None:
    """Return what a panic report says: two JSON objects, one object, or the bare text. None if it is no panic."""
    header, body = _objects(text)
    found = next(
        (body[key] for key in ("panicString", "macOSPanicString") if isinstance(body.get(key), str) and body[key]), ""
    )
    if not found and not body and _PANIC_LINE.search(text):
        found = text
    if not found:
        return None
    match = _PANIC_LINE.search(found)
    line = found[match.end() if match else 0 :].lstrip().partition("\n")[0]
    at = _time(header.get("timestamp")) or _time(body.get("date")) or _calendar(found)
    known = known_panic(found)
    task = _TASK.search(found)
    return PanicReport(
        at=at,
        text=_clean(line, _MAX_PANIC_TEXT),
        words="" if known is None else known.words,
        kind="other" if known is None else known.kind,
        pid=int(task.group(1)) if task else 0,
    )


def _objects(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the first line's JSON object and the rest's, each empty if it is none; a lone object is the body."""
    first, _, rest = text.lstrip("\ufeff \n").partition("\n")
    header, body = _object(first), _object(rest)
    if body:
        return header, body
    return {}, _object(text) or header


def _object(text: str) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(text.encode(errors="replace"))
    except (msgspec.MsgspecError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _time(stamp: object) -> float | None:
    match = _STAMP.match(stamp) if isinstance(stamp, str) else None
    if match is None:
        return None
    try:
        return datetime.datetime.strptime(" ".join(match.groups()), "%Y-%m-%d %H:%M:%S %z").timestamp()
    except (ValueError, OverflowError):
        return None


def _calendar(text: str) -> float | None:
    match = _CALENDAR.search(text)
    return float(int(match.group(1), 16)) if match else None


def _clean(text: str, limit: int) -> str:
    return _CONTROLS.sub(" ", text).strip()[:limit]


# -- folders --------------------------------------------------------------------------------------------------------


def report_folders() -> tuple[Path, ...]:
    """Return where this system puts its reports; nowhere on Linux."""
    if sys.platform == "darwin":
        system = Path("/Library/Logs/DiagnosticReports")
        own = Path.home() / "Library/Logs/DiagnosticReports"
        return own, system, system / "Retired", system / "ProxiedDevice-Bridge"
    return ()


def killed_by_jetsam(pid: int, since: float, folders: Iterable[Path]) -> str:
    """Return why the system killed the process for memory, "" if no report since then (Unix time) says that it did."""
    for text in _reports(folders, re.compile(r"JetsamEvent-.{1,100}\.ips"), since):
        report = jetsam_report(text)
        if report is not None and pid in report.killed and (report.at is None or report.at >= since - 1):
            return report.killed[pid] or "unknown reason"
    return ""


def panics_since(since: float, folders: Iterable[Path]) -> list[PanicReport]:
    """Return the panics since a Unix time, newest report first. A report that does not say when counts by its file."""
    found = []
    names = re.compile(r"(?:panic-(?:full|base)-.{1,100}\.(?:panic|ips)|Kernel[-_].{1,100}\.panic)(?:\.ips)?")
    for text in _reports(folders, names, since):
        report = panic_time_and_text(text)
        if report is not None and (report.at is None or report.at >= since):
            found.append(report)
    return found


def _reports(folders: Iterable[Path], names: re.Pattern[str], since: float) -> Iterator[str]:
    """Yield the texts of the newest matching files written since a Unix time; what cannot be read is left out."""
    files: list[tuple[float, str]] = []
    for folder in folders:
        try:
            with os.scandir(folder) as entries:
                for number, entry in enumerate(entries):
                    if number >= _MAX_ENTRIES:
                        break
                    if names.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        files.append((entry.stat(follow_symlinks=False).st_mtime, entry.path))
        except OSError:
            continue
    for changed, path in sorted(files, reverse=True)[:MAX_REPORTS]:
        if changed < since - 1:
            return
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as stream:
                yield stream.read(MAX_REPORT_BYTES).decode(errors="replace")
        except OSError:
            continue
