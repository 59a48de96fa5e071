"""The host breaker: several models that fail together are the machine's fault, not theirs."""

import msgspec

from protocol.config import LifecycleConfig


class Breaker(msgspec.Struct, frozen=True):
    """Recent failures over all models, and until when starts are rationed. Times are monotonic seconds."""

    failures: tuple[tuple[float, str], ...] = ()
    open_until: float = 0.0
    last_start: float = float("-inf")


def after_failure(breaker: Breaker, model: str, now: float, config: LifecycleConfig) -> Breaker:
    """Return the breaker after a counted failure of a model."""
    recent = tuple((at, who) for at, who in breaker.failures if now - at <= config.breaker_window_s)
    failures = (*recent, (now, model))[-config.breaker_failures :]
    trips = len(failures) >= config.breaker_failures and len({who for _, who in failures}) > 1
    open_until = now + config.breaker_open_s if trips or now < breaker.open_until else breaker.open_until
    return msgspec.structs.replace(breaker, failures=failures, open_until=open_until)


def start_allowed_at(breaker: Breaker, now: float, config: LifecycleConfig) -> float:
    """Return when the next model may be started: now, or later while the breaker is open."""
    if now >= breaker.open_until:
        return now
    return max(now, min(breaker.last_start + config.breaker_start_every_s, breaker.open_until))


def after_start(breaker: Breaker, now: float) -> Breaker:
    """Return the breaker after a start."""
    return msgspec.structs.replace(breaker, last_start=now)
