"""The line before one model: who waits, since when, for how much longer. Pure: time is an argument."""

from typing import Final

import msgspec

from gateway.requests import Request
from protocol.errors import LmxError

NEVER: Final = float("inf")


class Waiting(msgspec.Struct):
    """One in the line. `error`: what to say when the wait is over, if not why the model is not there.

    `avoid` is the incarnation that gave the request back; before `not_before` it is not submitted again.
    """

    request: Request
    since: float
    error: LmxError | None = None
    avoid: int = 0
    not_before: float = 0.0


class Line:
    """Those whose answer was interrupted, and behind them those that have come since."""

    def __init__(self) -> None:
        self._interrupted: dict[int, Waiting] = {}
        self._newcomers: dict[int, Waiting] = {}
        #: When those in front last had a reason to go on waiting.
        self.moved_at = 0.0

    def __len__(self) -> int:
        return len(self._interrupted) + len(self._newcomers)

    @property
    def newcomers(self) -> int:
        """How many have not been with any process."""
        return len(self._newcomers)

    def all(self) -> list[Waiting]:
        """Return everyone, in order."""
        return [*self._interrupted.values(), *self._newcomers.values()]

    def join(self, waiting: Waiting) -> None:
        """Wait behind everyone else."""
        self._newcomers[waiting.request.rid] = waiting

    def join_in_front(self, waiting: Waiting) -> None:
        """Wait behind the others that were interrupted."""
        self._interrupted[waiting.request.rid] = waiting

    def interrupted(self, rid: int) -> Waiting | None:
        """Return the one that was interrupted and is called `rid`."""
        return self._interrupted.get(rid)

    def drop(self, rid: int) -> None:
        """Leave the line; whoever is not in it stays so."""
        self._interrupted.pop(rid, None)
        self._newcomers.pop(rid, None)

    def overdue(self, hold_s: float, now: float) -> list[Waiting]:
        """Return those that have waited for `hold_s`."""
        return [waiting for waiting in self.all() if now >= self._over_at(waiting, hold_s)]

    def next_change(self, hold_s: float, now: float) -> float:
        """Return when time alone changes something next."""
        over = min((self._over_at(waiting, hold_s) for waiting in self.all()), default=NEVER)
        ready = min((w.not_before for w in self._interrupted.values() if w.not_before > now), default=NEVER)
        return min(over, ready)

    def _over_at(self, waiting: Waiting, hold_s: float) -> float:
        in_front = waiting.request.rid in self._interrupted
        return (max(waiting.since, self.moved_at) if in_front else waiting.since) + hold_s
