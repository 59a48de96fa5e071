"""Models that are loaded by the first request for them: which may be, and one load however many ask."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from protocol.modelfolder import ModelFolderError
from supervisor.admission import NoRoomError
from supervisor.journal import Journal

#: Every model of the models folder.
ALL: Final = "*"
#: After a refusal nobody tries again for so long.
REFUSED_S: Final = 30.0
#: Loads that may wait for room at once; one more is asked for again by its clients.
_MAX_LOADS: Final = 8


class CannotLoadError(Exception):
    """A model cannot be given a slot; the text says why."""


class OnDemand:
    """Answers a gateway's wish for a model with a load, if the configuration allows it.

    `folders` returns the models that could be loaded, `load(model, path)` gives one a slot and raises `NoRoomError`,
    `ModelFolderError` or `CannotLoadError`; `closed` says why nothing may be loaded by itself, empty in ordinary times.
    `changed` is told when `refusal` would answer differently.
    """

    def __init__(
        self,
        allowed: Sequence[str],
        journal: Journal,
        *,
        folders: Callable[[], dict[str, Path]],
        load: Callable[[str, Path], Awaitable[object]],
        closed: Callable[[], str],
        changed: Callable[[], None],
    ) -> None:
        self._allowed = frozenset(allowed)
        self._journal = journal
        self._folders = folders
        self._load = load
        self._closed = closed
        self._changed = changed
        self._loads: dict[str, asyncio.Task[None]] = {}
        #: Until when (monotonic seconds), the error's code, and words.
        self._refused: dict[str, tuple[float, str, str]] = {}

    def allows(self, model: str) -> bool:
        """Return whether a request may load this model."""
        return ALL in self._allowed or model in self._allowed

    def refusal(self, model: str, now: float) -> tuple[str, str] | None:
        """Return the code and the words with which the last load was refused, None if it is worth another try."""
        until, code, words = self._refused.get(model, (0.0, "", ""))
        return (code, words) if now < until else None

    def wanted(self, model: str) -> None:
        """Load a model that somebody asks for, unless it is being loaded, may not be, or was refused a moment ago."""
        if not self.allows(model) or model in self._loads or len(self._loads) >= _MAX_LOADS:
            return
        path = self._folders().get(model)
        if path is None or self.refusal(model, time.monotonic()) is not None:
            return
        why_not = self._closed()
        if why_not:
            self._refuse(model, "model_quarantined", f"nothing is loaded on demand: {why_not}")
            self._changed()
            return
        self._journal.write("load_on_demand", model=model)
        self._loads[model] = asyncio.get_running_loop().create_task(self._run(model, path))

    def close(self) -> None:
        """Give up what is under way."""
        for task in self._loads.values():
            task.cancel()

    async def _run(self, model: str, path: Path) -> None:
        try:
            await self._load(model, path)
        except NoRoomError as error:
            self._refuse(model, "insufficient_memory", str(error))
        except (ModelFolderError, CannotLoadError, TimeoutError) as error:
            self._refuse(model, "model_not_found", str(error) or "it was not given a place in time")
        else:
            self._refused.pop(model, None)
        finally:
            del self._loads[model]
            self._changed()

    def _refuse(self, model: str, code: str, words: str) -> None:
        now = time.monotonic()
        self._refused = {name: refused for name, refused in self._refused.items() if now < refused[0]}
        self._refused[model] = (now + REFUSED_S, code, words)
        self._journal.write("load_on_demand_refused", level="WARNING", model=model, reason=words)
