"""Events on their way from the engine to the IO thread: a queue, and the byte that wakes the one who empties it.

Waking the IO thread, the gateway and the clients for each step costs a small model more than its tokens do. So steps
that merely go on wait until the IO thread looks by itself, within `gather_s` of the last ones; whatever somebody waits
for wakes it at once. The steps of a model that takes longer for one than that never wait.
"""

import contextlib
import socket
import threading
from collections import deque
from time import monotonic
from typing import Final

from protocol.states import Phase
from worker.jobs import GOES_ON, Event, Status, Stepped

#: With more rows in a step than this steps wait in proportion, up to so many times as long: the more clients there are
#: to wake, the more it costs.
_ROWS: Final = 16
_MOST_TIMES: Final = 3.0
#: A reader that is busy is not waited for any longer.
_YIELD_S: Final = 0.0005

NEVER: Final = float("inf")


class Mailbox:
    """`put` is for any thread, everything else for the IO thread. `status` is written by the engine."""

    def __init__(self, status: Status, gather_s: float) -> None:
        self._status = status
        self._gather_s = gather_s
        self._events: deque[Event] = deque()
        #: Whether a byte is on its way that has not been read.
        self._woken = False
        #: Whether steps may wait for `due`.
        self._gathering = False
        #: When to look without being woken, `time.monotonic()`.
        self.due = NEVER
        self._wake_in, self._wake_out = socket.socketpair()
        #: The reader has begun to look.
        self._heard = threading.Event()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)

    @property
    def fileno(self) -> int:
        """What becomes readable when there is something to take."""
        return self._wake_in.fileno()

    @property
    def wake_fd(self) -> int:
        """What else may be written to: the signal module writes signal numbers."""
        return self._wake_out.fileno()

    def put(self, happened: Event) -> None:
        """Hand over an event. One byte wakes the reader, however many events it then finds.

        Whoever wakes the reader gives it a moment: building the next step holds the interpreter for as long as a small
        model takes to make it, and somebody waits for this event.
        """
        self._events.append(happened)
        if self._woken or (self._gathering and self._can_wait(happened)):
            return
        self._woken = True
        self._heard.clear()
        with contextlib.suppress(BlockingIOError):  # full of wake-ups already
            self._wake_out.send(b"\0")
        self._heard.wait(_YIELD_S)

    def read_wake_ups(self) -> set[int]:
        """Return the bytes that arrived: zeros, and the numbers of signals. Then take the events."""
        try:
            arrived = set(self._wake_in.recv(4096))
        except BlockingIOError:
            arrived = set()
        # Before the events are taken: one that is added after this line writes a new byte.
        self._woken = False
        return arrived

    def take(self) -> list[Event | list[Stepped]]:
        """Return what there is in its order, steps that follow each other as one list."""
        # Before the events are taken, for the same reason.
        self._gathering = False
        self._heard.set()
        self.due = NEVER
        taken: list[Event | list[Stepped]] = []
        events = self._events
        while events:
            happened = events.popleft()
            if not isinstance(happened, Stepped):
                taken.append(happened)
            elif taken and isinstance(taken[-1], list):
                taken[-1].append(happened)
            else:
                taken.append([happened])
        if self._gather_s and taken and isinstance(taken[-1], list):
            rows = len(taken[-1][-1].tokens)
            self.due = monotonic() + self._gather_s * min(max(1.0, rows / _ROWS), _MOST_TIMES)
            self._gathering = True
        return taken

    def close(self) -> None:
        """Close the sockets; nothing may be put any more."""
        self._wake_in.close()
        self._wake_out.close()

    def _can_wait(self, happened: Event) -> bool:
        """Return whether nobody waits for this: no first token is in it, and no end."""
        return (
            isinstance(happened, Stepped)
            and self._status.phase is Phase.DECODE
            and all(end == GOES_ON for _, _, end in happened.tokens)
        )
