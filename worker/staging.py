"""A folder that appears whole or not at all.

Work goes on in a hidden sibling of the destination, on the same file system, which is synced and renamed at the
end. A lock held meanwhile tells a live sibling from one that a SIGKILL left behind: whoever gets the lock removes
what it finds.
"""

import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from worker.tool_errors import ModelToolError

_POLL_S: Final = 0.2


@contextmanager
def staged_folder(destination: Path, failed: type[ModelToolError], *, wait_s: float = 0) -> Iterator[Path]:
    """Yield an empty folder that becomes `destination` if the block ends well, and is removed if it does not.

    Raises `failed` with code `exists` if the destination is there, `busy` if another process is still making it
    after `wait_s` seconds, `io` or `no_space` if the disk refuses.
    """
    parent = destination.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(parent / f".{destination.name}.lock", destination, failed, wait_s):
            _remove_stale(destination)
            if os.path.lexists(destination):
                msg = f"{destination} exists already: remove it, or choose another name"
                raise failed("exists", msg)
            staging = parent / f".{destination.name}.part-{secrets.token_hex(4)}"
            try:
                staging.mkdir()
                yield staging
                _sync_tree(staging)
                staging.rename(destination)
                _sync(parent)
            finally:
                shutil.rmtree(staging, ignore_errors=True)  # a no-op after the rename
    except OSError as error:
        raise failed("io", f"{error.filename or destination}: {error.strerror or error}") from error


def check_space(folder: Path, need_bytes: int, failed: type[ModelToolError]) -> None:
    """Refuse before writing what cannot fit; a full disk stops more than an import."""
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        msg = f"{need_bytes / 1e9:.2f} GB are needed in {folder}, {free / 1e9:.2f} GB are free"
        raise failed("no_space", msg)


@contextmanager
def _exclusive(lock: Path, destination: Path, failed: type[ModelToolError], wait_s: float) -> Iterator[None]:
    """Hold the lock file; it is removed at the end, so that nothing but the result is left."""
    deadline = time.monotonic() + wait_s
    while (descriptor := _try_lock(lock)) is None:
        if time.monotonic() >= deadline:
            raise failed("busy", f"another process is making {destination}: wait for it")
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _try_lock(lock: Path) -> int | None:
    """Return a descriptor that holds the lock; None if it is taken, or was removed by its last holder just now."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, lock):
            return descriptor
    except BlockingIOError:
        pass
    os.close(descriptor)
    return None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _remove_stale(destination: Path) -> None:
    pattern = re.compile(re.escape(f".{destination.name}.part-") + "[0-9a-f]{8}")
    for entry in destination.parent.iterdir():
        if pattern.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone leaves it in the drive's cache
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
