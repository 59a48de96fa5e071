"""How many requests models run at once while the machine's memory runs short: pure (design 8).

Between `memory.slow` and `memory.shed` the share of the slots falls in eighths from all to one; above, nothing new is
begun at all. It falls at once, on two samples in a row, and rises again an eighth at a time, so that what comes back
with the requests is seen before more of them come.
"""

import math
from typing import Final

import msgspec

from protocol.config import MemoryConfig

_STEPS: Final = 8
#: Below the mark for the next higher share by so much, and for so long, before it rises.
_EASED: Final = 0.02
_RISE_S: Final = 2.0


class Concurrency(msgspec.Struct, frozen=True):
    """The share of its slots that each model may use, and what is remembered between samples."""

    share: float = 1.0
    #: What the last sample alone would have allowed.
    last: float = 1.0
    #: Since when it has been low enough for more, on a monotonic clock.
    eased_at: float | None = None


def adapt(seen: Concurrency, used: float | None, config: MemoryConfig, now: float) -> Concurrency:
    """Return what to remember after one sample; `used` is the share of the machine's memory in use, None unknown."""
    if used is None:
        return seen
    allowed = _allowed(used, config)
    fallen = max(allowed, seen.last)
    if fallen < seen.share:
        return Concurrency(fallen, allowed)
    if _allowed(used + _EASED, config) <= seen.share:
        return Concurrency(seen.share, allowed)
    since = now if seen.eased_at is None else seen.eased_at
    if now - since < _RISE_S:
        return Concurrency(seen.share, allowed, since)
    return Concurrency(min(1.0, seen.share + 1 / _STEPS), allowed, now)


def slots(seen: Concurrency, configured: int) -> int:
    """Return how many of its slots a model may use, at least one; 0 for all."""
    return 0 if seen.share >= 1 else max(1, math.ceil(configured * seen.share))


def _allowed(used: float, config: MemoryConfig) -> float:
    if used < config.slow or config.shed <= config.slow:
        return 1.0
    left = (config.shed - used) / (config.shed - config.slow)
    return max(1, math.ceil(left * _STEPS)) / _STEPS
