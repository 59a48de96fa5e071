"""How long prompts wait for others that are about to come, so that they are processed together. Pure policy.

A small group costs nearly what a large one does, and requests of many clients arrive one by one, a millisecond apart.
Nobody waits without a reason: the gateway has said that more are on their way, or more answers have just ended than
have been followed by another request, as when clients ask again at once. Whoever is alone begins at once.
"""

from typing import Final

#: What the gateway has already read is here in less.
_COMING_S: Final = 0.006
#: A client that goes on at once does so within this time.
_AGAIN_S: Final = 0.003
#: Ended answers are remembered for so long.
_REMEMBERED_S: Final = 0.02
#: Nobody waits longer, however many come.
_MOST_S: Final = 0.02


class Gathering:
    """The prompts that have come and have not begun. Times are of the caller's monotonic clock."""

    def __init__(self) -> None:
        self._first_at: float | None = None
        self._until = 0.0
        #: Answers that ended, less the requests that came since.
        self._ended = 0
        self._ended_at = 0.0

    def came(self, coming: int, now: float) -> None:
        """Note that a prompt is here, and how many are said to follow at once."""
        if self._first_at is None:
            self._first_at = now
        self._ended = max(0, self._ended - 1) if now - self._ended_at < _REMEMBERED_S else 0
        wait_s = _COMING_S if coming > 0 else _AGAIN_S if self._ended else 0.0
        self._until = min(now + wait_s, self._first_at + _MOST_S)

    def ended(self, answers: int, now: float) -> None:
        """Note that so many answers have ended."""
        if now - self._ended_at >= _REMEMBERED_S:
            self._ended = 0
        self._ended += answers
        self._ended_at = now

    def wait_s(self, now: float) -> float:
        """Return how much longer those that are here wait; 0 if they begin now."""
        return max(0.0, self._until - now)

    def begin(self) -> None:
        """Note that all that were here have begun."""
        self._first_at = None
