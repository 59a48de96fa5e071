"""A recorded pid is only ours with the same start time and the same boot; anybody else's is never signalled."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from supervisor.adoption import living, stale
from supervisor.children import Child, end_stranger
from supervisor.platform import current_platform
from supervisor.platform.base import Platform
from supervisor.store import ChildRecord, Runtime
from tests.logkit import logged


class Table:
    """A process table: pid to start time."""

    def __init__(self, boot: str, **started: float) -> None:
        self._boot = boot
        self._started = {int(pid[1:]): at for pid, at in started.items()}

    def boot_id(self) -> str:
        return self._boot

    def process_started(self, pid: int) -> float | None:
        return self._started.get(pid)


def recorded(**started: float) -> Runtime:
    children = tuple(ChildRecord(f"slot-{pid}", "one", 1, int(pid[1:]), at) for pid, at in started.items())
    return Runtime(boot_id="this boot", children=children)


def pids(children: tuple[ChildRecord, ...]) -> list[int]:
    return [child.pid for child in children]


@pytest.mark.parametrize(
    ("boot", "ours", "others"),
    [("this boot", [10], [11]), ("next boot", [], [10, 11])],
)
def test_a_process_is_ours_by_pid_start_and_boot_and_the_rest_is_named(
    boot: str, ours: list[int], others: list[int]
) -> None:
    platform: Platform = Table(boot, p10=1.5, p11=99.0)  # type: ignore[assignment]
    before = recorded(p10=1.5, p11=1.5, p12=1.5)
    assert pids(living(before, platform)) == ours
    assert pids(stale(before, platform)) == others, "12 is gone, which is nothing to speak of"


@pytest.fixture
def stranger() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


async def test_a_child_whose_pid_is_somebody_elses_is_not_signalled(stranger: "subprocess.Popen[bytes]") -> None:
    platform = current_platform()
    started = platform.process_started(stranger.pid)
    assert started is not None
    child = Child(platform, stranger.pid, started - 1, lambda _code: None)
    with logged() as seen:
        for number in (signal.SIGTERM, signal.SIGKILL):
            child.signal(number)
        await end_stranger(platform, stranger.pid, started - 1, grace_s=0.05)
    child.forget()
    await asyncio.sleep(0.05)
    assert stranger.poll() is None
    assert [(entry["event"], entry["pid"]) for entry in seen] == [("stale_identity", stranger.pid)] * 2
