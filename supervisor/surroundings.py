"""What around us slows or endangers the service: launchd's view of our job, and heat. Shown, never waited for."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from protocol.config import Config
from supervisor.guard import Guard
from supervisor.journal import Journal
from supervisor.platform import launchd
from supervisor.thermal import Thermometer


class Surroundings:
    """Looks at the job once, and at the temperature all the time."""

    def __init__(self, config: Config, journal: Journal, guard: Guard, changed: Callable[[], None]) -> None:
        self._lifecycle = config.lifecycle
        self._journal = journal
        self._guard = guard
        self._changed = changed
        self._thermometer = Thermometer(config.thermal, journal, guard, changed)
        self._job: list[str] = []

    def document(self) -> dict[str, Any]:
        """Return what belongs into the status document."""
        return {"job_problems": self._job, "thermal": self._thermometer.document()}

    async def run(self) -> None:
        """Look until cancelled."""
        with self._guard("job"):
            await self._look_at_job()
        await self._thermometer.run()

    async def _look_at_job(self) -> None:
        # A thread of its own: launchctl may hang, and loads wait for the common one.
        executor = ThreadPoolExecutor(1, thread_name_prefix="job")
        try:
            printed = await asyncio.get_running_loop().run_in_executor(executor, launchd.printed_job)
        finally:
            executor.shutdown(wait=False)
        self._job = launchd.problems(printed, launchd.stop_seconds(self._lifecycle))
        for problem in self._job:
            self._journal.write("job_misconfigured", level="WARNING", reason=problem)
        if self._job:
            self._changed()
