"""How much is written to the SSD for prefixes that nobody has come back to yet. Pure: the clock is an argument.

Every token of every request is a block before long: 100 tokens a second of an 8B model would be a terabyte a day. What
was used a second time is worth writing; of the rest, so much a day.
"""

from typing import Final

_DAY_S: Final = 86_400.0


class Wear:
    """A bucket of bytes: `burst` at once, refilled with `per_day`."""

    def __init__(self, burst: int, per_day: int, now: float) -> None:
        self._burst = burst
        self._per_day = per_day
        self._left = float(burst)
        self._at = now

    def allows(self, nbytes: int, now: float) -> bool:
        """Return whether so many bytes may be written, and count them if so."""
        self._left = min(float(self._burst), self._left + max(0.0, now - self._at) * self._per_day / _DAY_S)
        self._at = now
        if nbytes > self._left:
            return False
        self._left -= nbytes
        return True
