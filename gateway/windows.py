"""Counting within sliding windows of a minute: the part that uses the package `limits`.

A module of its own because importing the package takes a tenth of a second, which a gateway that limits nobody is
spared when it is started again.
"""

import math
import time
from functools import lru_cache
from typing import Final, NamedTuple

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

WINDOW_S: Final = 60
#: Windows that are kept, two for each client and limit; the oldest goes when there are more.
MAX_WINDOWS: Final = 20_000


class Window(NamedTuple):
    """The last whole minute of the clock, what of it still counts (seconds), and the present one with its rest."""

    name: str
    before: int
    before_s: float
    now: int
    left_s: float

    def counted(self) -> int:
        """Return how much counts as taken within the past minute."""
        return math.floor(self.before * self.before_s / WINDOW_S + self.now)

    def wait_s(self, limit: int, cost: int) -> int:
        """Return the whole seconds after which `cost` would be granted if nobody asked meanwhile."""
        room = limit - cost + 1  # what counts has to be below it
        if self.before and self.now < room:
            wait = self.before_s - (room - self.now) * WINDOW_S / self.before
            if wait < self.left_s:
                return max(1, math.floor(wait) + 1)
        rest = max(0.0, WINDOW_S - room * WINDOW_S / self.now) if self.now else 0.0
        return max(1, math.floor(self.left_s + rest) + 1)


class BoundedStorage(MemoryStorage):
    """The memory storage of `limits` with a bound, without its sweep, and without a task switch or a wait.

    The sweep looks at every key on each hit: with 10,000 clients that is milliseconds of the event loop. Here a new
    window pushes out the oldest ones that are over, and the oldest one in any case if there are too many.
    """

    STORAGE_SCHEME = None  # type: ignore[assignment]  # not to be had by URL

    def __init__(self, size: int = MAX_WINDOWS) -> None:
        super().__init__()
        self._size = size
        #: What the last hit found and left. Nothing waits between a hit and a look at this.
        self.last = Window("", 0, 0.0, 0, 0.0)

    async def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:  # noqa: ARG002
        """Count `amount` more if that is within `limit`; return whether it was."""
        self.last = window = self.window(key)
        if window.counted() + amount > limit:
            return False
        self.add(window.name, amount)
        self.last = window._replace(now=window.now + amount)
        return True

    def window(self, key: str) -> Window:
        """Return what counts for a client and limit at this moment."""
        now = time.time()
        last, present = self.sliding_window_keys(key, WINDOW_S, now)
        left_s = WINDOW_S - now % WINDOW_S
        return Window(present, self.storage.get(last, 0), left_s, self.storage.get(present, 0), left_s)

    def add(self, window: str, amount: int) -> None:
        """Count `amount` more in a window."""
        if window not in self.storage:
            now = time.time()
            while self.expirations and (
                len(self.expirations) >= self._size or self.expirations[next(iter(self.expirations))] <= now
            ):
                oldest = next(iter(self.expirations))
                del self.expirations[oldest], self.storage[oldest]
            self.expirations[window] = now + 2 * WINDOW_S
        self.storage[window] += amount

    def take_back(self, window: str, amount: int) -> None:
        """Count `amount` less in a window, if it is still there."""
        if window in self.storage:
            self.storage[window] = max(0, self.storage[window] - amount)


class Windows:
    """What clients took of each kind within the past minute."""

    def __init__(self) -> None:
        self.storage = BoundedStorage()
        self._strategy = SlidingWindowCounterRateLimiter(self.storage)

    async def take(self, kind: str, client: str, limit: int, cost: int = 1) -> tuple[bool, Window]:
        """Count `cost` more if that is within `limit`; return whether it was, and what is counted now. Never waits."""
        granted = await self._strategy.hit(_item(kind, limit), client, cost=cost)
        return granted, self.storage.last

    def correct(self, kind: str, client: str, limit: int, window: str, difference: int) -> None:
        """Count more now, or less in the window where it was counted, if that is still there."""
        if difference < 0:
            self.storage.take_back(window, -difference)
        elif difference > 0:
            now = self.storage.window(_item(kind, limit).key_for(client))
            self.storage.add(now.name, difference)


@lru_cache(maxsize=1024)
def _item(kind: str, limit: int) -> RateLimitItemPerMinute:
    return RateLimitItemPerMinute(limit, namespace=kind)
