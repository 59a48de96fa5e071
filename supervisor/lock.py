"""One supervisor per home: an advisory lock that the kernel drops when its holder dies, however it dies."""

import contextlib
import fcntl
import os
from pathlib import Path


class AlreadyRunningError(Exception):
    """Another supervisor holds the home; the text names its pid."""


class HomeLock:
    """Holds `file` locked until `release`."""

    def __init__(self, file: Path) -> None:
        self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(self._descriptor)
            msg = f"a supervisor (pid {holder}) already runs on {file.parent.parent}"
            raise AlreadyRunningError(msg) from None
        with contextlib.suppress(OSError):  # the pid is for people; a full disk must not keep us from serving
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode("ascii"), 0)

    def release(self) -> None:
        """Let the next supervisor in."""
        os.close(self._descriptor)
