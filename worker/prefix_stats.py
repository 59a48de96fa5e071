"""What both kinds of prefix cache count, report and leave to others."""

from collections.abc import Callable
from typing import Final

import msgspec

from protocol.logs import event

#: Nobody came back to it for so long.
UNUSED_S: Final = 3600.0
_REPORT_EVERY_S: Final = 60.0


class Stats(msgspec.Struct):
    """Counted since the process began."""

    requests: int = 0
    hits: int = 0
    tokens_reused: int = 0
    tokens_from_disk: int = 0
    rejected: int = 0


class Reporter:
    """Logs the numbers at most once a minute, and only when there are others."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at = clock() + _REPORT_EVERY_S
        self._requests = 0

    def report(self, stats: Stats, nbytes: int, limit_bytes: int, entries: int) -> None:
        """Log if it is time to."""
        now = self._clock()
        if now < self._at or stats.requests == self._requests:
            return
        self._at, self._requests = now + _REPORT_EVERY_S, stats.requests
        event(
            "prefix_cache",
            bytes=nbytes,
            limit_bytes=limit_bytes,
            entries=entries,
            requests=stats.requests,
            hits=stats.hits,
            tokens_reused=stats.tokens_reused,
            tokens_from_disk=stats.tokens_from_disk,
            rejected=stats.rejected,
        )


def allowed(configured: int, held: int, spare: Callable[[], int] | None) -> int:
    """Return how many bytes may be kept now: what the requests need comes before what may be needed again."""
    return configured if spare is None else max(0, min(configured, held + spare()))
