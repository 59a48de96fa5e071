"""What becomes of what a worker keeps for the next one, by how it ends."""

from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from protocol.config import LifecycleConfig, ModelsConfig
from protocol.control import Capabilities
from protocol.spec import WorkerSpec
from protocol.states import WorkerExit
from worker import process
from worker.failures import FatalError
from worker.jobs import NO_SCORES, Command, End, Job, Loaded, Status


class Backend:
    """Raises, once it has something to do."""

    prefilling = False
    scores = NO_SCORES

    def __init__(self, error: Exception) -> None:
        self._error = error
        self._jobs = 0

    def __len__(self) -> int:
        return self._jobs

    def insert(self, _job: Job) -> None:
        self._jobs += 1

    def remove(self, _jobs: Any) -> None:
        """Nobody asks."""

    def step(self) -> list[Any]:
        raise self._error


class Io:
    """Hears everything."""

    def emit(self, _event: Any) -> None:
        """Never mind."""


def serve(tmp_path: Path, command: Command, error: Exception, said: list[str]) -> tuple[WorkerExit, str]:
    spec = WorkerSpec("w", "m", 1, str(tmp_path), "", "", "", "INFO", ModelsConfig(), LifecycleConfig())
    commands: Queue[Command] = Queue()
    commands.put(command)
    loaded = Loaded(
        backend=Backend(error),
        capabilities=Capabilities(8, 0, ["chat"], 1, True),
        prepare=lambda _: pytest.fail("nobody asks"),
        canary=lambda: None,
        memory=lambda: (0, 0, 0),
        close=lambda: said.append("kept"),
        abandon=lambda: said.append("dropped"),
    )
    io: Any = Io()
    return process._serve(spec, lambda _spec, _report: loaded, io, Status(), commands)


def test_an_engine_that_ends_as_asked_keeps_what_the_next_one_can_use(tmp_path: Path) -> None:
    said: list[str] = []
    code, _ = serve(tmp_path, End(WorkerExit.ASKED, "stop"), RuntimeError(), said)
    assert (code, said) == (WorkerExit.ASKED, ["kept"])


@pytest.mark.parametrize("error", [RuntimeError("[metal] x"), FatalError(WorkerExit.GPU_POISONED, "x")])
def test_after_any_exception_of_the_engine_everything_is_dropped(tmp_path: Path, error: Exception) -> None:
    said: list[str] = []
    code, _ = serve(tmp_path, Job(1, [1], 1), error, said)
    assert code is not WorkerExit.ASKED
    assert said == ["dropped"]
