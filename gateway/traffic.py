"""How much inference is running, and whether more is let in."""

import asyncio
import contextlib
from collections.abc import Iterator

from protocol.errors import LmxError


class Traffic:
    """Counts inference requests from their first byte to their last; turns new ones away while draining."""

    def __init__(self) -> None:
        self.running = 0
        self._draining = False
        self._closing = False
        self._leaving = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def draining(self) -> bool:
        """Whether no inference is taken any more."""
        return self._draining

    @property
    def closing(self) -> bool:
        """Whether connections are closed after the response that comes next: another gateway takes the new ones."""
        return self._closing

    def drain(self) -> None:
        """Take no more inference."""
        self._draining = True
        self._leaving.set()

    def close(self) -> None:
        """Let connections go after their next response."""
        self._closing = True
        self._leaving.set()

    async def leaving(self) -> None:
        """Wait until this gateway drains or hands over: what would go on for ever ends then."""
        await self._leaving.wait()

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Count one request while the block runs; raise `shutting_down` if none is taken any more."""
        if self.draining:
            raise LmxError("shutting_down", "The server is stopping and takes no new requests.")
        self.running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.running -= 1
            if self.running == 0:
                self._idle.set()

    async def idle(self, within_s: float) -> bool:
        """Wait until nothing runs; return whether that came true in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._idle.wait()
        return self.running == 0
