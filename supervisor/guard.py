"""Keeps an exception in one part of the supervisor from ending the others."""

import contextlib
from collections.abc import Iterator

from protocol.logs import exception_event


class Guard:
    """`with guard("tick"): …` logs whatever is raised inside, counts it in `count`, and goes on."""

    def __init__(self) -> None:
        self.count = 0

    @contextlib.contextmanager
    def __call__(self, where: str) -> Iterator[None]:
        """Run a block; `where` is for the log."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the supervisor must outlive its own bugs
            self.count += 1
            exception_event("internal_error", error, where=where)
