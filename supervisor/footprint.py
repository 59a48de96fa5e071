"""Looks at memory: of a process, and of the machine. Whatever goes wrong is unknown, which is None and never 0."""

from collections.abc import Callable
from typing import Final, TypeVar

from supervisor.guard import Guard
from supervisor.ledger import Machine
from supervisor.platform.base import Platform, Pressure

_MAX_FAILING: Final = 1000
T = TypeVar("T")


class Meter:
    """Asks the platform. An adapter that raises is a bug: it is logged once, not four times a second."""

    def __init__(self, platform: Platform, guard: Guard) -> None:
        self._platform = platform
        self._guard = guard
        self._failing: set[str] = set()

    def process(self, pid: int) -> int | None:
        """Return the bytes that a process occupies."""
        return self._asked(f"footprint {pid}", lambda: self._platform.footprint(pid))

    def available(self) -> int | None:
        """Return the bytes that a new process could be given now."""
        return self._asked("available", self._platform.available)

    def machine(self) -> Machine:
        """Return what the machine has, and what of it is free."""
        total = self._asked("total", self._platform.total)
        return Machine(total, self.available(), self._asked("gpu", self._platform.gpu_limit))

    def pressure(self) -> Pressure | None:
        """Return how short of memory the system says it is."""
        return self._asked("pressure", self._platform.pressure)

    def _asked(self, name: str, question: Callable[[], T | None]) -> T | None:
        try:
            answer = question()
        except Exception:
            if name not in self._failing:
                if len(self._failing) >= _MAX_FAILING:  # of processes that are long gone
                    self._failing.clear()
                self._failing.add(name)
                with self._guard("sample"):
                    raise
            return None
        self._failing.discard(name)
        return answer
