"""Holds a fault worker until a test lets it go on."""

import contextlib
import os
from pathlib import Path
from typing import Self


class Pipe:
    """A named pipe for a fault plan: each byte lets its process do one thing (`tests.fault.plan`).

    Once it is closed nothing is held any more.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        os.mkfifo(file)
        # Both ways: neither end waits for the other.
        self._end: int | None = os.open(file, os.O_RDWR | os.O_NONBLOCK)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._end is not None:
            os.close(self._end)
            self._end = None

    def let(self, count: int = 1) -> None:
        assert self._end is not None
        os.write(self._end, bytes(count))

    def take_back(self) -> None:
        """Take out what nobody has read."""
        assert self._end is not None
        with contextlib.suppress(BlockingIOError):
            while os.read(self._end, 4096):
                pass
