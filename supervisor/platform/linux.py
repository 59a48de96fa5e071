"""Linux: pidfd, /proc, SO_PEERCRED."""

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Final

from supervisor.platform.blas import Preload, find_blas

_UCRED: Final = struct.Struct("iII")
#: Position of `starttime` (clock ticks since boot) behind the command name in /proc/PID/stat, see proc(5).
_STARTTIME: Final = 19


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
        """Return the proportional set size: shared library pages are counted once over all processes."""
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        except OSError:
            return None
        for line in text.splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
        return None

    def available(self) -> int | None:
        """Return `MemAvailable`."""
        try:
            text = Path("/proc/meminfo").read_text(encoding="ascii")
        except OSError:
            return None
        for line in text.splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return None

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
