"""Looks at memory: of a process, and of the machine. Whatever goes wrong is unknown, which is None and never 0."""

from collections.abc import Callable
from typing import TypeVar

from supervisor.ledger import Machine
from supervisor.platform.base import Platform, Pressure

T = TypeVar("T")


def of_process(platform: Platform, pid: int) -> int | None:
    """Return the bytes that a process occupies."""
    return _asked(lambda: platform.footprint(pid))


def available(platform: Platform) -> int | None:
    """Return the bytes that a new process could be given now."""
    return _asked(platform.available)


def of_machine(platform: Platform) -> Machine:
    """Return what the machine has, and what of it is free."""
    return Machine(_asked(platform.total), available(platform), _asked(platform.gpu_limit))


def pressure(platform: Platform) -> Pressure | None:
    """Return how short of memory the system says it is."""
    return _asked(platform.pressure)


def _asked(question: Callable[[], T | None]) -> T | None:
    try:
        return question()
    except Exception:  # noqa: BLE001 - an adapter that fails knows nothing; that is an answer
        return None
