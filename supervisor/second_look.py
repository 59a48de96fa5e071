"""A second look at an exit: macOS writes the report of a kill for memory some seconds after the kill."""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

from supervisor.exits import ExitRecord, classify
from supervisor.platform.reports import killed_by_jetsam

#: Reports are there within this time, as far as anybody has published it.
LOOK_AGAIN_S: Final = 5.0


class SecondLook:
    """Looks again for the system's reports after exits that only such a report can explain."""

    def __init__(self, after_s: float = LOOK_AGAIN_S) -> None:
        self._after_s = after_s
        self._tasks: set[asyncio.Task[None]] = set()

    def arrange(
        self, end: ExitRecord, pid: int, since: float, folders: tuple[Path, ...], found: Callable[[ExitRecord], None]
    ) -> None:
        """Call `found` with the better record if a report turns up. Without folders of reports there is none."""
        if end.name == "killed" and folders:
            task = asyncio.get_running_loop().create_task(self._look(end, pid, since, folders, found))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _look(
        self, end: ExitRecord, pid: int, since: float, folders: tuple[Path, ...], found: Callable[[ExitRecord], None]
    ) -> None:
        await asyncio.sleep(self._after_s)
        if await asyncio.to_thread(killed_by_jetsam, pid, since, folders):
            found(classify(-signal.SIGKILL, at=end.at, asked=False, hung=False, jetsam=True))

    def close(self) -> None:
        """Look no more."""
        for task in self._tasks:
            task.cancel()
