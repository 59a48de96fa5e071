"""Telling a machine that stood still from one that is late: sleep, SIGSTOP, a debugger."""


class Standstill:
    """Notes when its owner last looked at the clock, and until when it meant to rest. Pure: time is an argument.

    Deadlines that ran out while everything stood still say nothing about anybody; whoever judges them asks here
    first. A look is due at once after each look, unless `rest_until` said otherwise: so a standstill in the middle
    of work is seen as well as one while waiting.
    """

    def __init__(self, slept_s: float, now: float) -> None:
        self._slept_s = slept_s
        self._due = now

    def rest_until(self, due: float) -> None:
        """The owner will look again then, if nothing wakes it before."""
        self._due = due

    def rested(self, seconds: float) -> None:
        """The owner meant to rest for so long since it last looked."""
        self._due += seconds

    def look(self, now: float) -> float:
        """Return for how many seconds all stood still: 0 unless longer than `slept_s`."""
        late, self._due = now - self._due, now
        return late if late > self._slept_s else 0.0
