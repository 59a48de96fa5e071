"""How much one client may take: requests and tokens per minute, requests at a time.

The windows slide: the last whole minute counts with the part of it that lies within the past 60 s.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final, NamedTuple

from gateway.auth import Access
from protocol.errors import LmxError
from protocol.profiles import Rules

if TYPE_CHECKING:
    from gateway.windows import Window, Windows

_WINDOW_S: Final = 60
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

    client: str
    limit: int
    window: str
    tokens: int


class Limiter:
    """Counts what clients take. One per application."""

    def __init__(self, rules: Rules) -> None:
        self._default = Budget(rules.inference_per_minute, rules.tokens_per_minute, rules.concurrent_requests)
        self._admin = rules.admin_per_minute
        self._running: dict[str, int] = {}
        if self._admin or self._default.requests or self._default.tokens:
            _ = self.windows  # now, and not while somebody waits

    @cached_property
    def windows(self) -> "Windows":
        """What was taken within the past minute; made when something is limited."""
        from gateway.windows import Windows  # noqa: PLC0415 - see there

        return Windows()

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
        """Count one order of an administrator, or one refused request; raise `rate_limit_exceeded`."""
        if self._admin:
            await self._take("admin", client, self._admin, 1, headers)

    async def inference(self, client: str, budget: Budget, headers: Headers) -> None:
        """Count one request for inference, good or not; raise `rate_limit_exceeded`."""
        if budget.requests:
            await self._take("requests", client, budget.requests, 1, headers)

    async def reserve(self, client: str, limit: int, tokens: int, headers: Headers) -> Reservation:
        """Take `tokens` before the work begins; raise `rate_limit_exceeded`."""
        if tokens > limit:
            text = f"This request may take {tokens} tokens, and {limit} per minute are allowed: ask for fewer."
            raise LmxError("rate_limit_exceeded", text, retry_after_s=_WINDOW_S)
        window = await self._take("tokens", client, limit, tokens, headers)
        return Reservation(client, limit, window.name, tokens)

    def settle(self, reservation: Reservation, used: int) -> None:
        """Count what it really was."""
        difference = used - reservation.tokens
        self.windows.correct("tokens", reservation.client, reservation.limit, reservation.window, difference)

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

    async def _take(self, kind: str, client: str, limit: int, cost: int, headers: Headers) -> "Window":
        windows = self.windows
        granted, window = await windows.take(kind, client, limit, cost)
        what = "tokens" if kind == "tokens" else "requests"
        describe(what, limit, window, headers)
        if not granted:
            wait = window.wait_s(limit, cost)
            text = f"More than {limit} {what} per minute: try again in {wait} s."
            raise LmxError("rate_limit_exceeded", text, retry_after_s=wait)
        return window


def describe(what: str, limit: int, window: "Window", headers: Headers) -> None:
    """Add OpenAI's three headers."""
    left = max(0, limit - window.counted())
    reset = window.left_s + _WINDOW_S if window.now else window.left_s if window.before else 0.0
    limit_name, left_name, reset_name = _HEADERS[what]
    headers += (
        (limit_name, b"%d" % limit),
        (left_name, b"%d" % left),
        (reset_name, duration(reset).encode()),
    )


def duration(seconds: float) -> str:
    """Return a duration as OpenAI writes it in headers: `20ms`, `1s`, `1m30s`."""
    if seconds <= 0:
        return "0s"
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{whole}s"
