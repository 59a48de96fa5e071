"""Whether the next process of a model may start yet, or what the last one held is still missing: pure (design 6).

A GPU driver may keep the memory of a process that is gone. A model that is loaded on top of it takes the machine down,
so a start waits for what it needs to be free, and says so when that takes too long.
"""

from enum import Enum, auto
from typing import Final

import msgspec

#: A model needs its weights and some more: cache, buffers, Python.
_OVER_WEIGHTS: Final = 1.25
_GIB: Final = 1024**3


class Owed(msgspec.Struct, frozen=True):
    """What the next process of a model needs, in bytes, and when the last one ended (monotonic seconds)."""

    needed: int
    since: float


class Verdict(Enum):
    """What to do about a start."""

    START = auto()
    WAIT = auto()
    BLOCK = auto()


def owed(footprint: int, weight_bytes: int, now: float) -> Owed | None:
    """Return what has to be free before the next start, None if the dead process was never measured.

    One that died of using too much is not waited for with all it had: the next one begins with the weights.
    """
    if footprint <= 0:
        return None
    return Owed(min(footprint, int(weight_bytes * _OVER_WEIGHTS)) if weight_bytes > 0 else footprint, now)


def judge(debt: Owed | None, available: int | None, now: float, wait_s: float) -> Verdict:
    """Return whether to start. `available` is what the system could give now, None if that is unknown (never 0)."""
    if debt is None or (available is not None and available >= debt.needed):
        return Verdict.START
    if now - debt.since < wait_s:
        return Verdict.WAIT
    return Verdict.START if available is None else Verdict.BLOCK


def words(debt: Owed, available: int, now: float) -> str:
    """Say why it is not started."""
    return (
        f"MEMORY NOT RECLAIMED {now - debt.since:.0f} s after its process ended: it needs {debt.needed / _GIB:.1f} GiB "
        f"and {available / _GIB:.1f} GiB are free. It starts when they are; a restart of the machine frees them"
    )
