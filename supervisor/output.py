"""What a process wrote to its stdout and stderr: the end of it, and as much of that as may be kept.

What a process wrote could hold anything: no worker prints prompts, but the message of an exception may quote what it
choked on, and people send tracebacks to models. So a line is kept only if all of it is known: messages of the crash
table, faulthandler's and Python's own lines, frames of installed code, exception types without their messages. In
place of every other line stands how long it was, which keeps the shape of the output and none of its contents.
"""

import os
import re
from pathlib import Path
from typing import Final

from supervisor.exits import TRACEBACK, known_text, shown_type

#: Raw output that is looked at: blanking shortens it.
MAX_RAW_BYTES: Final = 64 * 1024

_MAX_LINE: Final = 2000
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
_DUMP_HEAD: Final = re.compile(r"(?:Current thread|Thread) 0x[0-9a-f]{1,16} ")


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
