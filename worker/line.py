"""Whose turn it is: requests in line, by priority, and within one client by client. Pure policy.

The worker has two: for the slots of the batch, and for the chunks in which prompts are processed. Higher priorities go
first, but one that was passed over `PATIENCE` times gets the next turn, so that none starves. Within a priority the
client that holds least is next, and of those the one whose last turn is longest ago: a hundred requests of one client
delay another's first by one turn.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

#: Turns that others may have before it is one's own: of a priority below theirs, and of a request that needs more
#: room than is free while theirs need less.
PATIENCE: Final = 8

_Jobs = dict[int, None]


class Line:
    """Requests that wait for a place, and those that hold one, by their job numbers.

    Its owner bounds how many there are.
    """

    def __init__(self, *, patience: int | None = PATIENCE) -> None:
        """`patience`: how often one that does not fit is overtaken before all wait for it; None is for ever."""
        self._patience = patience
        #: Priority -> client -> jobs. Clients stand in the order of their turns, jobs in the order they came.
        self._waiting: dict[int, dict[str, _Jobs]] = {}
        self._asked: dict[int, tuple[int, str]] = {}
        self._holding: dict[int, str] = {}
        self._held: Counter[str] = Counter()
        self._passed: Counter[int] = Counter()
        self._overtaken: Counter[int] = Counter()

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._asked)

    @property
    def holding(self) -> int:
        """How many hold a place."""
        return len(self._holding)

    def holds(self, client: str) -> int:
        """Return how many places a client holds."""
        return self._held[client]

    def held_by(self, job: int) -> str | None:
        """Return whose place a job holds, None if it holds none."""
        return self._holding.get(job)

    def add(self, job: int, client: str, priority: int) -> None:
        """Stand in line."""
        self._asked[job] = priority, client
        self._waiting.setdefault(priority, {}).setdefault(client, {})[job] = None

    def drop(self, job: int) -> None:
        """Leave the line, or give back the place; an unknown job is ignored."""
        asked = self._asked.pop(job, None)
        if asked is not None:
            self._leave(job, *asked)
        client = self._holding.pop(job, None)
        if client is not None:
            self._held[client] -= 1
            if not self._held[client]:
                del self._held[client]

    def take(self, fits: Callable[[int], bool]) -> int | None:
        """Give the next job its place, None if there is none that may have one now.

        One that does not fit is passed over, `patience` times; then all wait for it.
        """
        passed: list[int] = []
        for job in self._turns():
            if fits(job):
                self._give(job)
                self._overtaken.update(passed)
                return job
            if self._patience is not None and self._overtaken[job] >= self._patience:
                return None
            passed.append(job)
        return None

    def displaced_by(self, client: str, priority: int) -> int | None:
        """Return who has to leave a full line for this client, None if it is the client itself that cannot wait.

        That is the newest job of the lowest priority below its own; or of its own, of the client that waits with most,
        if it does so with at least two more.
        """
        lowest = min(self._waiting, default=priority)
        if lowest > priority:
            return None
        clients = self._waiting.get(lowest, {})
        most = max(clients.values(), key=len, default={})
        if lowest == priority and len(most) < len(clients.get(client, ())) + 2:
            return None
        return next(reversed(most), None)

    def _turns(self) -> Iterator[int]:
        """Yield the oldest job of each client, in the order of their turns."""
        overdue = sorted((p for p in self._waiting if self._passed[p] >= PATIENCE), key=lambda p: -self._passed[p])
        others = sorted((p for p in self._waiting if self._passed[p] < PATIENCE), reverse=True)
        for priority in [*overdue, *others]:
            clients = self._waiting[priority]
            for client in sorted(clients, key=self._held.__getitem__):  # stable: in the order of their turns
                yield next(iter(clients[client]))

    def _give(self, job: int) -> None:
        priority, client = self._asked.pop(job)
        self._passed.update(lower for lower in self._waiting if lower < priority)
        del self._passed[priority]
        jobs = self._waiting[priority][client]
        self._leave(job, priority, client)
        if jobs:  # behind the other clients
            clients = self._waiting[priority]
            clients[client] = clients.pop(client)
        self._holding[job] = client
        self._held[client] += 1

    def _leave(self, job: int, priority: int, client: str) -> None:
        clients = self._waiting[priority]
        del clients[client][job]
        del self._overtaken[job]
        if not clients[client]:
            del clients[client]
        if not clients:
            del self._waiting[priority], self._passed[priority]
