"""Child processes: each in a session of its own, with files for pipes, told from strangers by start time."""

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from protocol.logs import event
from supervisor.platform.base import ExitWatch, Platform

_OUTPUT_LIMIT: Final = 10 * 1024 * 1024
#: What no process should die of, and none fail to start of.
DISK_TROUBLE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
#: What passes when somebody frees some: says nothing about the model that was to be started.
_MACHINE_TROUBLE: Final = DISK_TROUBLE | {errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.ENOBUFS}


class Child:
    """One living process that we started or adopted. `gone(returncode)` is called once, None if it was adopted."""

    def __init__(
        self,
        platform: Platform,
        pid: int,
        started: float,
        gone: Callable[[int | None], None],
        process: "subprocess.Popen[bytes] | None" = None,
    ) -> None:
        self.pid = pid
        self.started = started
        self._platform = platform
        self._process = process
        self._gone = gone
        self._watch: ExitWatch = platform.watch_exit(asyncio.get_running_loop(), pid, self._ended)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, but never to a stranger that has got the pid since."""
        if self._process is not None:
            # Unreaped, so the pid is still its own; `send_signal` checks that it has not been reaped.
            self._process.send_signal(number)
        elif self._is_still_itself():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _is_still_itself(self) -> bool:
        started = self._platform.process_started(self.pid)
        if started is not None and started != self.started:
            event("stale_identity", level="WARNING", pid=self.pid)
        return started == self.started

    def belongs_to(self, gone: Callable[[int | None], None]) -> None:
        """Have somebody else told of the end."""
        self._gone = gone

    def forget(self) -> None:
        """Stop watching, leaving the process to itself."""
        self._watch.close()

    def _ended(self) -> None:
        # What it started itself dies with it. Before the reaping, so that the group id cannot be another's yet.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._gone(_reap(self.pid) if self._process is None else self._process.wait(timeout=5))


def _reap(pid: int) -> int | None:
    """Return the exit status of an adopted process if it is our child (we replaced our own image), else None."""
    try:
        reaped, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status) if reaped else None


def spawn(
    platform: Platform,
    module: str,
    arguments: Sequence[str],
    *,
    output: Path,
    environ: Mapping[str, str],
    gone: Callable[[int | None], None],
    pass_fds: tuple[int, ...] = (),
) -> Child:
    """Start `python -m module arguments…`; raise `OSError` if the system refuses.

    stdout and stderr are appended to `output`, which is turned over at 10 MB: a pipe would die with its reader.
    """
    with contextlib.suppress(FileNotFoundError):
        if output.stat().st_size > _OUTPUT_LIMIT:
            output.replace(output.with_name(output.name + ".1"))
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(output, flags | os.O_CREAT, 0o600)
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
        event("output_not_kept", level="WARNING", file=output.name, reason=error.strerror)
        descriptor = os.open(os.devnull, flags)
    try:
        # -P: the folder we happen to stand in must not shadow our packages.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            env=dict(environ),
            pass_fds=pass_fds,
            start_new_session=True,
        )
    finally:
        os.close(descriptor)
    try:
        return Child(platform, process.pid, platform.process_started(process.pid) or 0.0, gone, process)
    except OSError:
        # No descriptor left to watch it with: what nobody watches must not run.
        process.kill()
        process.wait()
        raise


def start_failure(error: OSError) -> str:
    """Return the class of end that a failed start is."""
    return "no_resources" if error.errno in _MACHINE_TROUBLE else "start_failed"


def trim_outputs(folder: Path) -> None:
    """Turn over the output files of living processes that have become too long.

    They hold their files open to append, so a file is copied and emptied, not renamed. What is written between the two
    is lost: it is the price of a bound, and a process that writes so much says nothing new.
    """
    for output in folder.glob("*.out"):
        with contextlib.suppress(OSError):
            if output.is_symlink() or output.stat().st_size <= _OUTPUT_LIMIT:
                continue
            older = output.with_name(output.name + ".1")
            shutil.copyfile(output, older)
            older.chmod(0o600)
            os.truncate(output, 0)
            event("output_turned_over", file=output.name)


async def end_stranger(platform: Platform, pid: int, started: float, *, grace_s: float) -> None:
    """End a left-over process of ours that cannot be adopted: SIGTERM, then SIGKILL after `grace_s`."""
    gone = asyncio.Event()
    if platform.process_started(pid) != started:
        return
    try:
        child = Child(platform, pid, started, lambda _code: gone.set())
    except ProcessLookupError:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        child.signal(number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(gone.wait(), grace_s)
            return
    child.forget()
