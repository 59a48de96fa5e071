"""macOS reports a kill for memory some seconds late: the class of the end is corrected when the report is there."""

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from protocol.config import Config
from protocol.paths import Home
from protocol.states import ModelState
from supervisor import events as ev
from supervisor.blackbox import BlackBox
from supervisor.exits import classify
from supervisor.host import Host, Managed
from supervisor.journal import Journal
from supervisor.platform import current_platform
from supervisor.restarts import worker_policy
from supervisor.second_look import SecondLook

SAMPLES = Path(__file__).resolve().parents[1] / "corpus" / "crashes"
#: Of the process that the sample names, and when it says so (expected.json).
SAMPLE, PID, AT = "jetsam_compressor.ips", 90131, 1775790326.0
REPORT = "JetsamEvent-2026-04-10-030526.ips"


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    with tempfile.TemporaryDirectory(prefix="lmx-", dir="/tmp") as folder:
        home = Home(Path(folder) / "home")
        home.ensure()
        host = Host(home, Config(), current_platform(), Journal(home.state / "events.jsonl"), lambda: None)
        reports = Path(folder) / "DiagnosticReports"
        reports.mkdir()
        host.crashes.folders = (reports,)
        host.crashes.second_look = SecondLook(after_s=0.05)
        yield host
        host.close()


def dies(host: Host, pid: int, returncode: int = -9) -> Managed:
    """A model that was ready ends by a signal; nothing explains it yet."""
    config = host.config.lifecycle
    managed = host.add("one-slot", worker_policy(config), model="one")
    for event in (ev.Want(), ev.Started(pid, 1), ev.Helloed(), ev.BecameReady(1.0)):
        host.feed(managed, event)
    managed.box = BlackBox(host.home.logs / "one-slot.out", since_unix=AT - 60)
    host._ended(managed, returncode)
    return managed


def journal(host: Host, name: str) -> list[dict[str, Any]]:
    lines = (host.home.state / "events.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == name]


async def test_a_report_that_comes_late_corrects_status_journal_and_crash_record(host: Host) -> None:
    managed = dies(host, PID)
    (crash,) = host.crashes.store.records()
    assert crash.kind == "killed"
    host.crashes.name_casualties("one", 1, ["req_1"])
    waited_until = managed.slot.retry_at
    (folder,) = host.crashes.folders
    shutil.copyfile(SAMPLES / SAMPLE, folder / REPORT)
    await asyncio.gather(*host.crashes.second_look._tasks)
    (entry,) = journal(host, "exit_reclassified")
    assert (entry["was"], entry["exit_class"], entry["pid"]) == ("killed", "jetsam", PID)
    (corrected,) = host.crashes.store.records()
    assert entry["crash"] == corrected.id == crash.id
    assert (corrected.kind, corrected.requests) == ("jetsam", ("req_1",))
    assert corrected.words == entry["reason"]
    assert managed.slot.last_exit is not None
    assert managed.slot.last_exit.name == "jetsam"
    assert managed.slot.state is ModelState.BACKOFF
    assert managed.slot.retry_at >= waited_until + 20, "what was killed for memory is not started again at once"


@pytest.mark.parametrize(("pid", "returncode"), [(PID + 1, -9), (PID, -6)])
async def test_a_report_of_another_process_and_another_signal_change_nothing(
    host: Host, pid: int, returncode: int
) -> None:
    managed = dies(host, pid, returncode)
    before = managed.slot
    (folder,) = host.crashes.folders
    shutil.copyfile(SAMPLES / SAMPLE, folder / REPORT)
    await asyncio.gather(*host.crashes.second_look._tasks)
    assert managed.slot == before
    assert journal(host, "exit_reclassified") == []


async def test_a_report_does_not_touch_the_end_of_a_later_process(host: Host) -> None:
    managed = dies(host, PID)
    killed = managed.slot.last_exit
    assert killed is not None
    later = classify(-6, at=2.0, asked=False, hung=False)
    host.feed(managed, ev.Started(PID + 7, 2))
    host.feed(managed, ev.Exited(later))
    before = managed.slot
    host.feed(managed, ev.Reclassified(killed, msgspec.structs.replace(killed, name="jetsam")))
    assert managed.slot == before
