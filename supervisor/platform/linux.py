"""Linux: pidfd, /proc, SO_PEERCRED."""

import asyncio
import os
import re
import socket
import struct
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Final

from supervisor.platform.base import Pressure
from supervisor.platform.blas import Preload, find_blas

_UCRED: Final = struct.Struct("iII")
#: Position of `starttime` (clock ticks since boot) behind the command name in /proc/PID/stat, see proc(5).
_STARTTIME: Final = 19
_FIELD: Final = re.compile(rb"^(\w{1,40}):\s{1,40}(\d{1,18}) kB$", re.MULTILINE)
_STALLS: Final = re.compile(rb"^(some|full) avg10=(\d{1,3}\.\d{1,4}) ", re.MULTILINE)
#: Percent of the last ten seconds. A machine that waits for memory this much is close to standing still.
_WARNING_STALL: Final = 20.0
_CRITICAL_STALL: Final = 40.0


class PidfdWatch:
    """Watches one process through a pidfd, which becomes readable when the process ends."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pid: int, gone: Callable[[], None]) -> None:
        self._loop = loop
        self._gone = gone
        self._fd = os.pidfd_open(pid)
        loop.add_reader(self._fd, self._ended)

    def _ended(self) -> None:
        self.close()
        self._gone()

    def close(self) -> None:
        """Stop watching."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1


class Linux:
    """The Linux side of `Platform`."""

    @cached_property
    def _boot_id(self) -> str:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()

    def boot_id(self) -> str:
        """Return the kernel's boot id. Read once: later there may be no descriptor left to read it with."""
        return self._boot_id

    def process_started(self, pid: int) -> float | None:
        """Return the start in clock ticks since boot; None also for a zombie, which is gone but for its status."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return None
        fields = stat.rpartition(b")")[2].split()
        return None if fields[0] in {b"Z", b"X"} else float(fields[_STARTTIME])

    def watch_exit(self, loop: asyncio.AbstractEventLoop, pid: int, gone: Callable[[], None]) -> PidfdWatch:
        """Watch through a pidfd."""
        return PidfdWatch(loop, pid, gone)

    def footprint(self, pid: int) -> int | None:
        """Return anonymous, shared and swapped-out memory; pages of files, which can be dropped, are not in it.

        That is what macOS counts, too. The proportional set size would take 35 ms for each 600 MB.
        """
        fields = _fields(f"/proc/{pid}/status")
        if fields is None or b"RssAnon" not in fields:  # a zombie has no memory to tell of
            return None
        return sum(fields.get(name, 0) for name in (b"RssAnon", b"RssShmem", b"VmSwap")) * 1024

    def total(self) -> int | None:
        """Return `MemTotal`."""
        return _of_machine(b"MemTotal")

    def gpu_limit(self) -> int | None:
        """None: the CPU computes here."""
        return None

    def pressure(self) -> Pressure | None:
        """Return what the kernel's stall information amounts to: the share of the last 10 s that all or some waited."""
        try:
            text = Path("/proc/pressure/memory").read_bytes()
        except OSError:
            return None
        found = {match[1]: float(match[2]) for match in _STALLS.finditer(text)}
        if found.get(b"full", 0.0) >= _CRITICAL_STALL:
            return Pressure.CRITICAL
        return Pressure.WARNING if found.get(b"some", 0.0) >= _WARNING_STALL else Pressure.NORMAL

    def available(self) -> int | None:
        """Return `MemAvailable`."""
        return _of_machine(b"MemAvailable")

    def peer(self, sock: socket.socket) -> tuple[int, int]:
        """Return (uid, pid) from SO_PEERCRED."""
        pid, uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return uid, pid

    def full_sync(self, descriptor: int) -> None:
        """`fsync`, which on Linux reaches the disk."""
        os.fsync(descriptor)

    def preload(self, links: Path) -> Preload | None:
        """Return OpenBLAS of the `cmeel-openblas` package, if it computes here."""
        return find_blas(links)


def _fields(file: str) -> dict[bytes, int] | None:
    """Return the numbers of a file with lines of name, colon, number; None if it cannot be read."""
    try:
        text = Path(file).read_bytes()
    except OSError:
        return None
    return {match[1]: int(match[2]) for match in _FIELD.finditer(text)}


def _of_machine(name: bytes) -> int | None:
    value = (_fields("/proc/meminfo") or {}).get(name)
    return None if value is None else value * 1024
