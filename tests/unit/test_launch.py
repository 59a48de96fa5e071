"""What a process needs to know reaches it, also where no file can be written."""

import asyncio
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.config import Config, WorkerConfig
from protocol.paths import Home
from supervisor.children import start_failure
from supervisor.launch import Launcher
from supervisor.platform import current_platform

#: Prints the file that it is given.
READER = Config(worker=WorkerConfig(module="json.tool", preload_blas=False))


async def told(home: Home) -> int | None:
    """Start a worker that says what it was told; return how it ended."""
    ended: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
    launcher = Launcher(home, READER, current_platform())
    launcher.worker("one", 1, "the-model", "/models/one", ended.set_result, degraded=False)
    return await asyncio.wait_for(ended, 30)


@pytest.fixture
def home() -> Iterator[Home]:
    with tempfile.TemporaryDirectory(prefix="lmx-", dir="/tmp") as folder:
        home = Home(Path(folder) / "h")
        home.ensure()
        yield home


@pytest.mark.parametrize("writable", [True, False])
async def test_a_worker_gets_its_spec_whether_or_not_it_can_be_written(home: Home, writable: bool) -> None:
    if not writable:
        home.spec("one", 1).mkdir()  # no file can be here
    assert await told(home) == 0
    assert json.loads((home.logs / "one.out").read_text())["model"] == "the-model"


async def test_a_worker_starts_though_what_it_writes_cannot_be_kept(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def full(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if str(path).endswith("one.out"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", full)
    assert await told(home) == 0
    assert not (home.logs / "one.out").exists()


async def test_descriptors_are_not_used_up_by_starts(home: Home) -> None:
    home.spec("one", 1).mkdir()
    assert await told(home) == 0
    before = len(list(Path("/dev/fd").iterdir()))
    for _ in range(5):
        assert await told(home) == 0
    assert len(list(Path("/dev/fd").iterdir())) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.EAGAIN, errno.ENOMEM])
def test_what_the_machine_lacks_is_not_the_models_fault(number: int) -> None:
    assert start_failure(OSError(number, "")) == "no_resources"


def test_a_program_that_is_not_there_is_a_failure() -> None:
    assert start_failure(FileNotFoundError(errno.ENOENT, "")) == "start_failed"
