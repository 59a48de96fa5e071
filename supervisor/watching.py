"""Lets coroutines wait until something they look at has changed, instead of asking again and again."""

import asyncio
import contextlib
from collections.abc import Callable


class Changes:
    """A bell that rings after each change. Everyone who waits is woken; none is kept in a list."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        """Something changed."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout_s: float) -> None:
        """Return after the next change, or after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), timeout_s)

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Return once `condition` holds; the caller bounds the time."""
        while not condition():
            await self._event.wait()
