"""macOS: kqueue, proc_pid_rusage, LOCAL_PEERCRED, F_FULLFSYNC. Parsers are apart, to be tested on recorded bytes."""

import asyncio
import ctypes
import ctypes.util
import fcntl
import os
import select
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import psutil

from supervisor.platform.base import Pressure
from supervisor.platform.blas import Preload

#: `rusage_info_v0` of <sys/resource.h>: uuid[16] and ten 64-bit fields; `ri_phys_footprint` is the eighth.
RUSAGE_V0_BYTES: Final = 16 + 10 * 8
_FOOTPRINT_OFFSET: Final = 16 + 7 * 8
_RUSAGE_INFO_V0: Final = 0
#: <sys/un.h>, and `struct xucred` of <sys/ucred.h>: version, uid, ngroups, padding, 16 groups.
_SOL_LOCAL: Final = 0
_LOCAL_PEERCRED: Final = 1
_LOCAL_PEERPID: Final = 2
_XUCRED_BYTES: Final = 76
_XUCRED_HEAD_BYTES: Final = 8
_F_FULLFSYNC: Final = 51
#: Up to here macOS lets the GPU wire two thirds, above three quarters.
_SMALL_MACHINE_BYTES: Final = 36 * 1024**3


def footprint_of(rusage: bytes) -> int:
    """Return `ri_phys_footprint` of a `rusage_info_v0`, in bytes."""
    return int(struct.unpack_from("<Q", rusage, _FOOTPRINT_OFFSET)[0])


def uid_of(xucred: bytes) -> int:
    """Return the uid of a `struct xucred`; raise `PermissionError` for a version that is not known."""
    version, uid = struct.unpack_from("<II", xucred) if len(xucred) >= _XUCRED_HEAD_BYTES else (-1, 0)
    if version != 0:
        msg = "the system's peer credentials have an unknown form"
        raise PermissionError(msg)
    return int(uid)


class KqueueWatch:
    """Watches one process through a kqueue of its own, whose descriptor becomes readable when it ends."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pid: int, gone: Callable[[], None]) -> None:
        self._loop = loop
        self._gone = gone
        # `select` has these names on macOS only.
        api: Any = select
        self._queue: Any = api.kqueue()
        wanted = api.kevent(pid, api.KQ_FILTER_PROC, api.KQ_EV_ADD | api.KQ_EV_ONESHOT, api.KQ_NOTE_EXIT)
        try:
            self._queue.control([wanted], 0, 0)
        except OSError:
            self._queue.close()
            raise
        loop.add_reader(self._queue.fileno(), self._ended)

    def _ended(self) -> None:
        self.close()
        self._gone()

    def close(self) -> None:
        """Stop watching."""
        if not self._queue.closed:
            self._loop.remove_reader(self._queue.fileno())
            self._queue.close()


class Darwin:
    """The macOS side of `Platform`."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)

    def boot_id(self) -> str:
        """Return `kern.bootsessionuuid`."""
        size = ctypes.c_size_t(64)
        value = ctypes.create_string_buffer(size.value)
        if self._libc.sysctlbyname(b"kern.bootsessionuuid", value, ctypes.byref(size), None, 0) != 0:
            return f"boot-{psutil.boot_time():.0f}"
        return value.value.decode("ascii")

    def process_started(self, pid: int) -> float | None:
        """Return the start in Unix seconds, with microseconds; None for a zombie."""
        try:
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
        except psutil.Error:
            return None

    def watch_exit(self, loop: asyncio.AbstractEventLoop, pid: int, gone: Callable[[], None]) -> KqueueWatch:
        """Watch through kqueue, which also works for processes that are not our children."""
        return KqueueWatch(loop, pid, gone)

    def footprint(self, pid: int) -> int | None:
        """Return the physical footprint, which unlike RSS holds GPU memory."""
        usage = ctypes.create_string_buffer(RUSAGE_V0_BYTES)
        if self._libc.proc_pid_rusage(pid, _RUSAGE_INFO_V0, usage) != 0:
            return None
        return footprint_of(usage.raw)

    def total(self) -> int | None:
        """Return `hw.memsize`."""
        return self._sysctl(b"hw.memsize")

    def gpu_limit(self) -> int | None:
        """Return what Metal recommends: `iogpu.wired_limit_mb`, by default two thirds of small and three quarters of
        large machines."""
        megabytes, total = self._sysctl(b"iogpu.wired_limit_mb"), self.total()
        if megabytes:
            return megabytes * 1024 * 1024
        return None if total is None else total * 2 // 3 if total <= _SMALL_MACHINE_BYTES else total * 3 // 4

    def pressure(self) -> Pressure | None:
        """Return `kern.memorystatus_vm_pressure_level`."""
        level = self._sysctl(b"kern.memorystatus_vm_pressure_level")
        return Pressure(level) if level in set(Pressure) else None

    def _sysctl(self, name: bytes) -> int | None:
        """Return an integer, which may have 4 or 8 bytes; None if there is none of that name."""
        value = ctypes.create_string_buffer(8)
        size = ctypes.c_size_t(8)
        if self._libc.sysctlbyname(name, value, ctypes.byref(size), None, 0) != 0:
            return None
        return int.from_bytes(value.raw[: size.value], "little")

    def available(self) -> int | None:
        """Return free and inactive memory; what a dead process left wired is in neither."""
        try:
            return int(psutil.virtual_memory().available)
        except (psutil.Error, OSError, RuntimeError):
            return None

    def peer(self, sock: socket.socket) -> tuple[int, int]:
        """Return (uid, pid) from LOCAL_PEERCRED and LOCAL_PEERPID."""
        uid = uid_of(sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED_BYTES))
        return uid, sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID)

    def full_sync(self, descriptor: int) -> None:
        """F_FULLFSYNC: plain fsync leaves data in the drive's cache. Network volumes know only fsync."""
        try:
            fcntl.fcntl(descriptor, _F_FULLFSYNC)
        except OSError:
            os.fsync(descriptor)

    def preload(self, links: Path) -> Preload | None:
        """Nothing: Accelerate is linked in."""
        del links
        return None
