"""When the slots are looked at: soon after each event, and at the next deadline of any of them."""

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from typing import Final

from protocol.standstill import Standstill
from supervisor import events as ev
from supervisor import lifecycle as life
from supervisor.guard import Guard
from supervisor.journal import Journal
from supervisor.managed import Managed

_MAX_SLEEP_S: Final = 1.0
#: Turns of the event loop in which what lies in a socket is seen, is read, and is heard by whom it was for. The turn in
#: which a timer fires sees nothing if the process was stopped: its wait was interrupted.
_TURNS: Final = 3
#: A start that waits for memory looks again this often.
_LOOK_S: Final = 0.2


class Clock:
    """Wakes a host. `feed` lets something happen to a slot; `start_due(now)` starts what is due at a monotonic time.

    A time in which this machine stood still counts for no deadline: every slot is told how long it was.
    """

    def __init__(
        self,
        slots: Mapping[str, Managed],
        journal: Journal,
        guard: Guard,
        slept_s: float,
        *,
        feed: Callable[[Managed, ev.Event], None],
        start_due: Callable[[float], None],
    ) -> None:
        self._slots = slots
        self._journal = journal
        self._guard = guard
        self._feed = feed
        self._start_due = start_due
        self._timer: asyncio.TimerHandle | None = None
        self._standstill = Standstill(slept_s, now=math.inf)  # from the first timer on
        self._soon = False

    def wake_soon(self) -> None:
        """Look at what is due once the present events are done."""
        if not self._soon:
            self._soon = True
            asyncio.get_running_loop().call_soon(self._look)

    def close(self) -> None:
        """Wake nobody any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        """Start what is due and arrange to be woken at the next deadline."""
        self._soon = False
        self._forgive_standstill()
        now = time.monotonic()
        with self._guard("pump"):
            self._start_due(now)
        self._arm(now)

    def _arm(self, now: float) -> None:
        due = now + _MAX_SLEEP_S
        with self._guard("timer"):
            for managed in self._slots.values():
                when = life.next_deadline(managed.slot, managed.settings)
                # A waiting slot that is due already waits only for the loading place; the end of that load wakes us.
                if when is not None and (when > now or not managed.slot.waiting):
                    due = min(due, max(when, now))
                elif when is not None and (managed.owed is not None or managed.blocked):
                    due = min(due, now + _LOOK_S)
        if self._timer is not None:
            self._timer.cancel()
        self._standstill.rest_until(due)
        self._timer = asyncio.get_running_loop().call_later(max(0.0, due - now), self._tick)

    def _tick(self) -> None:
        self._judge_in(_TURNS)

    def _judge_in(self, turns: int) -> None:
        """After what has arrived meanwhile was heard: nobody is late because we were."""
        if turns:
            asyncio.get_running_loop().call_soon(self._judge_in, turns - 1)
            return
        if not self._forgive_standstill():
            self._feed_all(ev.Tick(0.0))
        self.wake_soon()

    def _forgive_standstill(self) -> bool:
        """Begin every deadline anew if this machine stood still. Return whether it did."""
        stood_s = self._standstill.look(time.monotonic())
        if stood_s:
            self._journal.write("slept", level="WARNING", seconds=round(stood_s, 1))
            self._feed_all(ev.Tick(stood_s))
        return stood_s > 0

    def _feed_all(self, happened: ev.Event) -> None:
        for managed in list(self._slots.values()):
            with self._guard("tick"):
                self._feed(managed, happened)
