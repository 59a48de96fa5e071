"""How much one client may take: requests and tokens per minute, requests at a time.

The windows slide: the last whole minute counts with the part of it that lies within the past 60 s. `limits` does the
counting, in its memory storage, which is bounded here.
"""

import math
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from gateway.auth import Access
from protocol.errors import LmxError
from protocol.profiles import Rules

_WINDOW_S: Final = 60
#: Windows that are kept, two for each client and limit; the oldest goes when there are more.
MAX_WINDOWS: Final = 20_000
_HEADERS: Final = {
    what: tuple(f"x-ratelimit-{name}-{what}".encode() for name in ("limit", "remaining", "reset"))
    for what in ("requests", "tokens")
}
Headers = list[tuple[bytes, bytes]]


class Budget(NamedTuple):
    """What a client may take; 0 is no limit."""

    requests: int
    tokens: int
    concurrent: int


@dataclass(slots=True)
class Reservation:
    """Tokens that were taken before anybody knew how many it would be. `window` is where they are counted."""

    item: RateLimitItemPerMinute
    client: str
    window: str
    tokens: int


class Window(NamedTuple):
    """The last whole minute of the clock, what of it still counts (seconds), and the present one with its rest."""

    name: str
    before: int
    before_s: float
    now: int
    left_s: float

    def counted(self) -> int:
        """Return how much counts as taken within the past minute."""
        return math.floor(self.before * self.before_s / _WINDOW_S + self.now)


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
        last, present = self.sliding_window_keys(key, _WINDOW_S, now)
        left_s = _WINDOW_S - now % _WINDOW_S
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
            self.expirations[window] = now + 2 * _WINDOW_S
        self.storage[window] += amount

    def take_back(self, window: str, amount: int) -> None:
        """Count `amount` less in a window, if it is still there."""
        if window in self.storage:
            self.storage[window] = max(0, self.storage[window] - amount)


class Limiter:
    """Counts what clients take. One per application."""

    def __init__(self, rules: Rules) -> None:
        self._default = Budget(rules.inference_per_minute, rules.tokens_per_minute, rules.concurrent_requests)
        self._admin = rules.admin_per_minute
        self._storage = BoundedStorage()
        self._strategy = SlidingWindowCounterRateLimiter(self._storage)
        self._running: dict[str, int] = {}

    def budget(self, access: Access) -> Budget:
        """Return what this client may take: the key's own limits before the configured ones."""
        key, default = access.key, self._default
        if key is None:
            return default
        return Budget(
            default.requests if key.requests_per_minute is None else key.requests_per_minute,
            default.tokens if key.tokens_per_minute is None else key.tokens_per_minute,
            default.concurrent if key.concurrent_requests is None else key.concurrent_requests,
        )

    async def admin(self, client: str, headers: Headers) -> None:
        """Count one admin request, good or not; raise `rate_limit_exceeded`."""
        if self._admin:
            await self._request("admin", client, self._admin, headers)

    async def inference(self, client: str, budget: Budget, headers: Headers) -> None:
        """Count one request for inference, good or not; raise `rate_limit_exceeded`."""
        if budget.requests:
            await self._request("requests", client, budget.requests, headers)

    async def reserve(self, client: str, limit: int, tokens: int, headers: Headers) -> Reservation:
        """Take `tokens` before the work begins; raise `rate_limit_exceeded`."""
        item = _item("tokens", limit)
        if tokens > limit:
            text = f"This request may take {tokens} tokens, and {limit} per minute are allowed: ask for fewer."
            raise LmxError("rate_limit_exceeded", text, retry_after_s=_WINDOW_S)
        granted = await self._strategy.hit(item, client, cost=tokens)
        window = self._storage.last
        describe("tokens", limit, window, headers)
        if not granted:
            wait = wait_s(window, limit, tokens)
            text = f"More than {limit} tokens per minute: try again in {wait} s, or ask for fewer tokens."
            raise LmxError("rate_limit_exceeded", text, retry_after_s=wait)
        return Reservation(item, client, window.name, tokens)

    def settle(self, reservation: Reservation, used: int) -> None:
        """Count what it really was."""
        difference = used - reservation.tokens
        if difference < 0:
            self._storage.take_back(reservation.window, -difference)
        elif difference > 0:
            now = self._storage.window(reservation.item.key_for(reservation.client))
            self._storage.add(now.name, difference)

    def enter(self, client: str, limit: int) -> None:
        """Count one running request; raise `rate_limit_exceeded`. Each that succeeds needs its `leave`."""
        running = self._running.get(client, 0)
        if limit and running >= limit:
            text = f"{running} requests of this client run already, and {limit} may: wait for one to end."
            raise LmxError("rate_limit_exceeded", text)
        self._running[client] = running + 1

    def leave(self, client: str) -> None:
        """A running request has ended."""
        if self._running[client] == 1:
            del self._running[client]
        else:
            self._running[client] -= 1

    async def _request(self, kind: str, client: str, limit: int, headers: Headers) -> None:
        item = _item(kind, limit)
        granted = await self._strategy.hit(item, client)
        window = self._storage.last
        describe("requests", limit, window, headers)
        if not granted:
            wait = wait_s(window, limit, 1)
            text = f"More than {limit} requests per minute: try again in {wait} s."
            raise LmxError("rate_limit_exceeded", text, retry_after_s=wait)


def describe(what: str, limit: int, window: Window, headers: Headers) -> None:
    """Add OpenAI's three headers."""
    left = max(0, limit - window.counted())
    reset = window.left_s + _WINDOW_S if window.now else window.left_s if window.before else 0.0
    limit_name, left_name, reset_name = _HEADERS[what]
    headers += (
        (limit_name, b"%d" % limit),
        (left_name, b"%d" % left),
        (reset_name, duration(reset).encode()),
    )


def wait_s(window: Window, limit: int, cost: int) -> int:
    """Return the whole seconds after which `cost` would be granted if nobody asked meanwhile."""
    room = limit - cost + 1  # what counts has to be below it
    if window.before and window.now < room:
        wait = window.before_s - (room - window.now) * _WINDOW_S / window.before
        if wait < window.left_s:
            return max(1, math.floor(wait) + 1)
    rest = max(0.0, _WINDOW_S - room * _WINDOW_S / window.now) if window.now else 0.0
    return max(1, math.floor(window.left_s + rest) + 1)


@lru_cache(maxsize=1024)
def _item(kind: str, limit: int) -> RateLimitItemPerMinute:
    return RateLimitItemPerMinute(limit, namespace=kind)


def duration(seconds: float) -> str:
    """Return a duration as OpenAI writes it in headers: `20ms`, `1s`, `1m30s`."""
    if seconds <= 0:
        return "0s"
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{whole}s"
