"""Who may use how much memory: pure policy (design 8). What does not fit is refused before it is loaded.

Every model has a claim: what was predicted for it, or what it really occupies if that is more. The claims stay below
the budget of this machine, and a load must also fit into what the system could give at this moment. Sizes are bytes,
times monotonic seconds. Unknown is None and never counts as 0: nothing new is loaded while it is.
"""

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Final

import msgspec

from protocol.config import MemoryConfig

_GIB: Final = 1024**3
_RESERVE: Final = 8 * _GIB
#: Of a small machine 8 GiB would be all there is.
_MAX_RESERVE_SHARE: Final = 0.25
_MIN_HEADROOM: Final = _GIB
_HEADROOM: Final = 0.5
#: Of the budget a worker may have for the caches of a full batch, whatever its weights.
_MAX_WISH_SHARE: Final = 0.25


class Machine(msgspec.Struct, frozen=True):
    """What the system says of itself. `gpu` is what the GPU may use, None without one."""

    total: int | None = None
    available: int | None = None
    gpu: int | None = None

    @property
    def used_share(self) -> float | None:
        """The share of the memory that is in use."""
        if self.total is None or self.available is None or self.total <= 0:
            return None
        return 1 - self.available / self.total


class Use(msgspec.Struct, frozen=True):
    """One loaded model. `need`: what was predicted, 0 if that is not known. `footprint`: None if it is not known."""

    model: str
    need: int
    footprint: int | None
    busy: bool = False
    ready: bool = True
    pinned: bool = False
    used_at: float = 0.0
    ttl_s: float = 0.0

    @property
    def claim(self) -> int:
        """What has to be kept for it."""
        return max(self.need, self.footprint or 0)

    @property
    def unfilled(self) -> int:
        """What it will still take of what is free."""
        return self.claim - (self.footprint or 0)

    @property
    def evictable(self) -> bool:
        """Whether it may be unloaded for another: nobody uses it, and nobody said that it should stay."""
        return self.ready and not self.busy and not self.pinned


class Verdict(Enum):
    """What becomes of a load."""

    FITS = auto()
    EVICT = auto()
    WAIT = auto()
    REFUSE = auto()
    UNKNOWN = auto()


class Plan(msgspec.Struct, frozen=True):
    """`evict`: what is unloaded first. `must_go`: what would have to be unloaded, whether that may be done or not."""

    verdict: Verdict
    need: int
    available: int | None
    evict: tuple[str, ...] = ()
    must_go: tuple[str, ...] = ()
    wait_s: float = 0.0

    @property
    def words(self) -> str:
        """Say it to a person; empty for a load that may begin."""
        if self.available is None:
            return "MEMORY UNMONITORED: the system does not say what is free, and nothing is loaded on a guess"
        short = f"needs {gib(self.need)} and {gib(self.available)} are available"
        match self.verdict:
            case Verdict.REFUSE if self.must_go:
                return f"{short}; unload first: {', '.join(self.must_go)}"
            case Verdict.REFUSE:
                return f"{short}, whatever is unloaded; free memory or take a smaller model"
            case Verdict.WAIT:
                names = ", ".join(self.evict)
                return f"{short}; a model was unloaded for another just now: {names} may be in {self.wait_s:.0f} s"
        return ""


def budget(machine: Machine, config: MemoryConfig) -> int | None:
    """Return what all processes of this home may use together, None if the machine's size is not known."""
    if machine.total is None:
        return None
    ceiling = int(machine.total * config.fraction)
    if machine.gpu is not None:
        ceiling = min(ceiling, machine.gpu)
    return max(0, min(ceiling, machine.total - reserve(machine.total, config)))


def reserve(total: int, config: MemoryConfig) -> int:
    """Return what is left to the rest of a machine of this size."""
    fixed = config.reserve_bytes or min(_RESERVE, int(total * _MAX_RESERVE_SHARE))
    return max(fixed, int(total * config.reserve_fraction))


def free(machine: Machine, uses: Sequence[Use], config: MemoryConfig) -> int | None:
    """Return what a new model may claim: of the budget, and of what the system could give now without shedding."""
    limit = budget(machine, config)
    if limit is None or machine.total is None or machine.available is None:
        return None
    if any(use.footprint is None and not use.need for use in uses):
        return None
    # What was promised to models that have not taken it yet is free only to the eye.
    promised = sum(use.unfilled for use in uses)
    spare = int(machine.total * max(0.0, 1 - config.shed))
    return max(0, min(limit - sum(use.claim for use in uses), machine.available - promised - spare))


def plan(
    need: int,
    machine: Machine,
    uses: Sequence[Use],
    config: MemoryConfig,
    *,
    now: float,
    last_eviction: float | None = None,
    may_evict: bool = True,
) -> Plan:
    """Return what becomes of a load that needs so much."""
    available = free(machine, uses, config)
    if available is None:
        return Plan(Verdict.UNKNOWN, need, None)
    if need <= available:
        return Plan(Verdict.FITS, need, available)
    oldest = sorted(uses, key=lambda use: use.used_at)
    must_go = _enough(need, machine, oldest, config, lambda _: True)
    evict = _enough(need, machine, oldest, config, lambda use: use.evictable)
    if not evict or not may_evict or not config.evict:
        return Plan(Verdict.REFUSE, need, available, must_go=must_go)
    wait_s = 0.0 if last_eviction is None else last_eviction + config.evict_every_s - now
    if wait_s > 0:
        return Plan(Verdict.WAIT, need, available, evict, must_go, wait_s)
    return Plan(Verdict.EVICT, need, available, evict, must_go)


def _enough(
    need: int, machine: Machine, oldest: Sequence[Use], config: MemoryConfig, fits: Callable[[Use], bool]
) -> tuple[str, ...]:
    """Return the least recently used models that make room when they go; nothing if all of them do not."""
    left, gone, known = list(oldest), [], machine.available or 0
    for use in oldest:
        if not fits(use):
            continue
        left.remove(use)
        gone.append(use)
        known += use.footprint or 0
        now_free = free(msgspec.structs.replace(machine, available=known), left, config)
        if now_free is not None and need <= now_free:
            # One that was taken before the last, larger one may not have been needed.
            for other in gone[:-1]:
                kept = [*left, other]
                with_it = msgspec.structs.replace(machine, available=known - (other.footprint or 0))
                again = free(with_it, kept, config)
                if again is not None and need <= again:
                    left, known = kept, known - (other.footprint or 0)
                    gone = [each for each in gone if each is not other]
            return tuple(each.model for each in gone)
    return ()


def expired(uses: Sequence[Use], now: float) -> list[str]:
    """Return the models that nobody has used for as long as they may stay."""
    return [use.model for use in uses if use.evictable and use.ttl_s > 0 and now - use.used_at >= use.ttl_s]


def largest(uses: Sequence[Use]) -> str:
    """Return the model that occupies most and is not pinned, "" if there is none."""
    known = [(use.footprint, use.model) for use in uses if use.footprint and not use.pinned]
    return max(known)[1] if known else ""


def worker_limit(need: int, settled: int, limit: int | None, config: MemoryConfig, wish: int = 0) -> int:
    """Return what one worker may occupy; 0 is no limit, for a model of which nothing is known.

    `settled` is what the present process occupied once it was ready, 0 before: a prediction that was too small must not
    end a process that does nothing wrong. `limit` is the budget of the host. `wish` is what the caches of a full batch
    would take beyond what was reserved; it gets at most a quarter of that budget.
    """
    if config.worker_limit_bytes:
        return config.worker_limit_bytes
    base = max(need, settled)
    if not base:
        return 0
    wish = wish if limit is None else min(wish, int(limit * _MAX_WISH_SHARE))
    wanted = base + max(_MIN_HEADROOM, int(base * _HEADROOM), wish)
    return wanted if limit is None else max(min(wanted, limit), base)


def cache_budget(limit: int, idle: int, reserved: int, kept: int, config: MemoryConfig) -> int:
    """Return what the caches of all requests of a worker may take together; 0 is no limit, for one without a limit.

    They stay below the mark at which the worker would stop to take requests, beside what it occupies when `idle` and
    what may be `kept` between requests, buffers and prefixes; but what was `reserved` for them when it was loaded is
    theirs in any case.
    """
    if not limit or not idle > 0:
        return 0
    return max(1, reserved, int(limit * config.soft) - idle - kept)


def gib(count: int) -> str:
    """Return bytes as GiB, or MiB when it is little."""
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / 1024**2:.0f} MiB"
