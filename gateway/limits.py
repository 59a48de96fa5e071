"""How much one client may take: requests and tokens per minute, requests at a time.

The windows slide: the last whole minute counts with the part of it that lies within the past 60 s. `limits` does the
counting, in its memory storage, which is bounded here.
"""

import math
import time
from dataclasses import dataclass
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


class BoundedStorage(MemoryStorage):
    """The memory storage of `limits` with a bound, and without its sweep.

    The sweep looks at every key on each hit: with 10,000 clients that is milliseconds of the event loop. Here a new
    window pushes out the oldest one, which nearly always is over.
    """

    STORAGE_SCHEME = None  # type: ignore[assignment]  # not to be had by URL

    def __init__(self, size: int = MAX_WINDOWS) -> None:
        super().__init__()
        self._size = size

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Count `amount` more in a window that lasts `expiry` seconds; return its count."""
        await self.get(key)  # forgets it if its time is over
        if key not in self.expirations:
            while len(self.expirations) >= self._size:
                await self.clear(next(iter(self.expirations)))
            self.expirations[key] = time.time() + expiry
        self.storage[key] += amount
        return self.storage[key]

    async def decr(self, key: str, amount: int = 1) -> int:
        """Count `amount` less in a window, if it is still there."""
        if key not in self.expirations:
            return 0
        self.storage[key] = max(0, self.storage[key] - amount)
        return self.storage[key]


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
        item = RateLimitItemPerMinute(limit, namespace="tokens")
        if tokens > limit:
            text = f"This request may take {tokens} tokens, and {limit} per minute are allowed: ask for fewer."
            raise LmxError("rate_limit_exceeded", text, retry_after_s=_WINDOW_S)
        granted = await self._strategy.hit(item, client, cost=tokens)
        await self._describe(item, client, "tokens", headers)
        if not granted:
            wait = await self._wait(item, client, tokens)
            text = f"More than {limit} tokens per minute: try again in {wait} s, or ask for fewer tokens."
            raise LmxError("rate_limit_exceeded", text, retry_after_s=wait)
        return Reservation(item, client, self._window(item, client), tokens)

    async def settle(self, reservation: Reservation, used: int) -> None:
        """Count what it really was."""
        difference = used - reservation.tokens
        if difference < 0:
            await self._storage.decr(reservation.window, -difference)
        elif difference > 0:
            window = self._window(reservation.item, reservation.client)
            await self._storage.incr(window, 2 * _WINDOW_S, difference)

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
        item = RateLimitItemPerMinute(limit, namespace=kind)
        granted = await self._strategy.hit(item, client)
        await self._describe(item, client, "requests", headers)
        if not granted:
            wait = await self._wait(item, client, 1)
            text = f"More than {limit} requests per minute: try again in {wait} s."
            raise LmxError("rate_limit_exceeded", text, retry_after_s=wait)

    async def _describe(self, item: RateLimitItemPerMinute, client: str, what: str, headers: Headers) -> None:
        """Add OpenAI's three headers."""
        before, before_s, now, now_s = await self._storage.get_sliding_window(item.key_for(client), _WINDOW_S)
        left = max(0, item.amount - math.floor(before * before_s / _WINDOW_S + now))
        reset = now_s if now else before_s
        for name, value in (("limit", str(item.amount)), ("remaining", str(left)), ("reset", duration(reset))):
            headers.append((f"x-ratelimit-{name}-{what}".encode(), value.encode()))

    async def _wait(self, item: RateLimitItemPerMinute, client: str, cost: int) -> int:
        """Return the whole seconds after which `cost` would be granted if nobody asked meanwhile."""
        before, before_s, now, now_s = await self._storage.get_sliding_window(item.key_for(client), _WINDOW_S)
        room = item.amount - cost + 1  # the weighted count has to be below it
        left_s = now_s - _WINDOW_S
        if before and now < room:
            wait = before_s - (room - now) * _WINDOW_S / before
            if wait < left_s:
                return max(1, math.floor(wait) + 1)
        wait = left_s + max(0.0, _WINDOW_S - room * _WINDOW_S / now) if now else left_s
        return max(1, math.floor(wait) + 1)

    def _window(self, item: RateLimitItemPerMinute, client: str) -> str:
        _, current = self._storage.sliding_window_keys(item.key_for(client), _WINDOW_S, time.time())
        return current


def duration(seconds: float) -> str:
    """Return a duration as OpenAI writes it in headers: `20ms`, `1s`, `1m30s`."""
    if seconds <= 0:
        return "0s"
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{whole}s"
