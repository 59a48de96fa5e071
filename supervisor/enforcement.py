"""What is done about a worker, or a machine, that uses too much memory: pure (design 8).

Nothing is done on one sample: it takes two in a row. A missing sample is neither good nor bad; enough of them in a row
are a process that is not monitored.
"""

from enum import Enum, auto
from typing import Final

import msgspec

from protocol.config import MemoryConfig
from supervisor.platform.base import Pressure

#: Samples in a row that make a fact; and missing ones that make a process unmonitored.
_FACT: Final = 2
_MISSING: Final = 12
#: Below the mark by so much it has eased.
_EASED: Final = 0.05
_SHED_EASED: Final = 0.02
#: So far below the mark at which requests are refused, caches go.
_EASE_BEFORE: Final = 0.05
#: Never replaced for less than this: an allocator's ups and downs.
_MIN_DRIFT: Final = 64 * 1024 * 1024
#: What MLX has given back leaves the footprint some seconds later.
_IDLE_DRIFT_S: Final = 5.0
#: One that takes no requests, and did not get smaller by that, is replaced after this.
_STUCK_S: Final = 10.0
#: After the largest model was ended the system gets so long to feel it.
_RELIEF_S: Final = 5.0


class Order(Enum):
    """What to do about a worker."""

    NOTHING = auto()
    EASE = auto()  # take no requests, clear caches
    ADMIT = auto()
    REPLACE = auto()
    END = auto()


class Watch(msgspec.Struct, frozen=True):
    """What is remembered of one process between samples. Times are monotonic seconds."""

    soft: int = 0
    low: int = 0
    hard: int = 0
    over: int = 0
    missing: int = 0
    closed: bool = False
    closed_at: float = 0.0
    drifting_since: float | None = None

    @property
    def unmonitored(self) -> bool:
        """Whether its memory has not been known for so long that nothing can be said of it."""
        return self.missing >= _MISSING


def watch(
    seen: Watch, footprint: int | None, limit: int, config: MemoryConfig, *, now: float, idle: bool
) -> tuple[Watch, Order]:
    """Return what to remember and to do after one sample. A limit of 0 is none."""
    if footprint is None:
        return msgspec.structs.replace(seen, missing=seen.missing + 1), Order.NOTHING
    share = footprint / limit if limit else 0.0
    seen = msgspec.structs.replace(
        seen,
        missing=0,
        soft=seen.soft + 1 if share >= config.soft else 0,
        low=seen.low + 1 if share < config.soft - _EASED else 0,
        hard=seen.hard + 1 if share >= config.hard else 0,
        over=seen.over + 1 if share >= config.kill else 0,
    )
    if seen.over >= _FACT:
        return seen, Order.END
    if seen.hard >= _FACT and not seen.over:  # else the next sample decides
        return seen, Order.REPLACE
    if seen.closed and seen.low >= _FACT:
        return msgspec.structs.replace(seen, closed=False), Order.ADMIT
    if seen.closed and idle and now - seen.closed_at >= _STUCK_S:
        return seen, Order.REPLACE
    if not seen.closed and seen.soft >= _FACT:
        return msgspec.structs.replace(seen, closed=True, closed_at=now), Order.EASE
    return seen, Order.NOTHING


def drift(
    seen: Watch, footprint: int | None, expected: int | None, need: int, config: MemoryConfig, *, now: float, idle: bool
) -> tuple[Watch, bool]:
    """Return what to remember, and whether the process should be replaced for what it holds beyond `expected`.

    Soon when nobody uses it, else when it has been so for the grace.
    """
    if footprint is None or expected is None or not config.rotate or not need:
        return seen, False
    if footprint - expected <= max(_MIN_DRIFT, int(need * config.rotate)):
        return msgspec.structs.replace(seen, drifting_since=None), False
    since = now if seen.drifting_since is None else seen.drifting_since
    seen = msgspec.structs.replace(seen, drifting_since=since)
    held_s = now - since
    return seen, held_s >= (min(_IDLE_DRIFT_S, config.rotate_grace_s) if idle else config.rotate_grace_s)


class Whole(msgspec.Struct, frozen=True):
    """What is remembered of the machine between samples."""

    high: int = 0
    low: int = 0
    critical: int = 0
    missing: int = 0
    shedding: bool = False
    ended_at: float | None = None

    @property
    def unmonitored(self) -> bool:
        """Whether the system has not said for a while what is free."""
        return self.missing >= _FACT


def whole(
    seen: Whole, used: float | None, pressure: Pressure | None, config: MemoryConfig, now: float
) -> tuple[Whole, bool]:
    """Return what to remember, and whether the largest model has to go now. `used` is the share in use."""
    dire = pressure is Pressure.CRITICAL or (used is not None and used >= config.critical)
    seen = msgspec.structs.replace(
        seen,
        missing=seen.missing + 1 if used is None else 0,
        high=seen.high if used is None else seen.high + 1 if used >= config.shed else 0,
        low=seen.low if used is None else seen.low + 1 if used < config.shed - _SHED_EASED else 0,
        critical=seen.critical + 1 if dire else 0,
    )
    shedding = not seen.low >= _FACT if seen.shedding else seen.high >= _FACT
    seen = msgspec.structs.replace(seen, shedding=shedding)
    rested = seen.ended_at is None or now - seen.ended_at >= _RELIEF_S
    return seen, seen.critical >= _FACT and rested


def should_ease(used: float | None, pressure: Pressure | None, config: MemoryConfig) -> bool:
    """Return whether caches should give way, which comes before anybody is refused. `used` is the share in use."""
    near = used is not None and used >= config.shed - _EASE_BEFORE
    return near or pressure in {Pressure.WARNING, Pressure.CRITICAL}


def ended(seen: Whole, now: float) -> Whole:
    """Return what to remember after the largest model was ended."""
    return msgspec.structs.replace(seen, ended_at=now, critical=0)
