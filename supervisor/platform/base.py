"""The interface between the supervisor and the operating system it runs on."""

import asyncio
import socket
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Protocol

from supervisor.platform.blas import Preload


class Pressure(IntEnum):
    """How short of memory the system says it is; the numbers are those of macOS."""

    NORMAL = 1
    WARNING = 2
    CRITICAL = 4


class ExitWatch(Protocol):
    """A watch for the end of a process."""

    def close(self) -> None:
        """Stop watching."""


class Platform(Protocol):
    """What the supervisor asks of the system. Sizes are bytes; None means unknown, which is never 0."""

    def boot_id(self) -> str:
        """Return a text that changes with each boot."""

    def process_started(self, pid: int) -> float | None:
        """Return when the process started, on a clock that tells a reused pid; None if there is no such process."""

    def watch_exit(self, loop: asyncio.AbstractEventLoop, pid: int, gone: Callable[[], None]) -> ExitWatch:
        """Call `gone` once when the process (child or not) ends; raise `ProcessLookupError` if it already has."""

    def footprint(self, pid: int) -> int | None:
        """Return the memory the process really occupies and nobody else does. Cheap: well below a millisecond."""

    def total(self) -> int | None:
        """Return the memory of the machine."""

    def gpu_limit(self) -> int | None:
        """Return what the GPU may use of it, None if there is none or it is not known."""

    def pressure(self) -> Pressure | None:
        """Return how short of memory the system is."""

    def available(self) -> int | None:
        """Return the memory that a new process could be given now."""

    def peer(self, sock: socket.socket) -> tuple[int, int]:
        """Return (uid, pid) of the other end of a unix socket."""

    def full_sync(self, descriptor: int) -> None:
        """Make what was written survive a power loss."""

    def preload(self, links: Path) -> Preload | None:
        """Return a matrix library that workers should preload, None if there is none that works.

        `links` is a folder of ours in which a link may be made.
        """
