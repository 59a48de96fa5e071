"""What the host makes of an end, around the pure policy."""

import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from protocol import control
from protocol.channel import Channel
from protocol.config import Config, LifecycleConfig
from protocol.framing import frame
from protocol.messages import encode
from protocol.paths import Home
from protocol.states import ModelState, Phase
from supervisor import adoption
from supervisor import events as ev
from supervisor.clock import Clock
from supervisor.guard import Guard
from supervisor.host import Host
from supervisor.journal import Journal
from supervisor.managed import Managed
from supervisor.peers import Peers
from supervisor.platform import current_platform
from supervisor.restarts import worker_policy
from supervisor.slot import Settings
from supervisor.store import ChildRecord
from supervisor.watching import Changes


@pytest.fixture
def home() -> Iterator[Home]:
    with tempfile.TemporaryDirectory(prefix="lmx-", dir="/tmp") as folder:
        home = Home(Path(folder))
        home.ensure()
        yield home


@pytest.mark.parametrize(
    ("condemned", "wanted", "opens"), [("hung", True, True), ("", True, False), ("x", False, False)]
)
async def test_hangs_of_several_models_open_the_breaker_and_ends_that_were_asked_for_do_not(
    home: Home, condemned: str, wanted: bool, opens: bool
) -> None:
    config = Config()
    host = Host(home, config, current_platform(), Journal(home.state / "events.jsonl"), lambda: None)
    for number in range(config.lifecycle.breaker_failures):
        managed = host.add(f"slot-{number}", worker_policy(config.lifecycle), model=f"model-{number}")
        for event in (ev.Want(), ev.Started(90_000 + number, number + 1), ev.BecameReady(1.0)):
            host.feed(managed, event)
        managed.slot = msgspec.structs.replace(
            managed.slot, state=ModelState.STOPPING, condemned=condemned, wanted=wanted
        )
        host._ended(managed, -9)
    host.close()
    assert ("host_breaker_open" in (home.state / "events.jsonl").read_text()) == opens


async def test_a_slot_that_was_forgotten_takes_no_other_of_its_name_with_it(home: Home) -> None:
    """Two operators unload one model, and a third loads it in between."""
    config = Config()
    host = Host(home, config, current_platform(), Journal(home.state / "events.jsonl"), lambda: None)
    old = host.add("one", worker_policy(config.lifecycle), model="one")
    host.remove(old)
    new = host.add("one", worker_policy(config.lifecycle), model="one")
    host.remove(old)
    assert host.find("one") is new
    host.remove(new)
    assert host.find("one") is None
    host.close()


async def test_what_a_process_had_said_before_its_end_counts_though_the_end_is_seen_first(home: Home) -> None:
    """We were busy, and find its words and its end in one moment: how far it was is not what we had read by then."""
    config = Config()
    host = Host(home, config, current_platform(), Journal(home.state / "events.jsonl"), lambda: None)
    Peers(host, lambda: control.Catalog(1, []), lambda _fd: None, lambda _model: None)
    managed = host.add("slot", worker_policy(config.lifecycle), model="model")
    for event in (ev.Want(), ev.Started(90_000, 1), ev.Helloed()):
        host.feed(managed, event)
    ours, theirs = socket.socketpair()
    managed.channel = Channel(ours, limit=control.MAX_FRAME_BYTES)
    warming = control.Heartbeat(Phase.WARMING, 7, 0.0, 0, 0, 0, 0, 0)
    for message in (warming, control.Dying(70, "the reason")):
        theirs.sendall(frame(encode(message)))
    host._ended(managed, 70)
    host.close()
    theirs.close()
    journal = [json.loads(line) for line in (home.state / "events.jsonl").read_text().splitlines()]
    (exited,) = [entry for entry in journal if entry["event"] == "process_exited"]
    assert (exited["state"], "the reason" in exited["reason"]) == ("warming", True)
    record = json.loads((home.crashes / exited["crash"] / "record.json").read_text())
    assert (record["phase"], record["step"]) == ("warming", 7)


@pytest.mark.parametrize("stopped", [False, True])
async def test_what_arrived_while_we_were_busy_is_heard_before_deadlines_are_judged(
    home: Home, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """The heartbeat lies in the socket: nobody is late because we were."""
    config = LifecycleConfig(hello_s=0.2)
    managed = Managed("slot", Settings(config, worker_policy(config)))
    managed.slot = msgspec.structs.replace(
        managed.slot, state=ModelState.STARTING, wanted=True, pid=90_000, since=time.monotonic()
    )
    told: list[str] = []
    clock = Clock(
        {"slot": managed},
        Journal(home.state / "events.jsonl"),
        Guard(),
        60.0,
        feed=lambda _managed, _event: told.append("judged"),
        start_due=lambda _now: None,
    )
    ours, theirs = socket.socketpair()
    channel = Channel(ours, limit=control.MAX_FRAME_BYTES)

    async def listen() -> None:
        await channel.receive()
        told.append("heard")

    listening = asyncio.create_task(listen())
    clock.wake_soon()
    await asyncio.sleep(0.01)  # the deadline is armed
    theirs.sendall(frame(b"heartbeat"))
    time.sleep(0.4)  # noqa: ASYNC251 - busy beyond the deadline
    if stopped:  # a wait that a stop has interrupted, and whose time is over, sees nothing
        selector = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]
        seen = selector.select
        answers = iter([lambda _timeout: []])
        monkeypatch.setattr(selector, "select", lambda timeout=None: next(answers, seen)(timeout))
    async with asyncio.timeout(20):
        await listening
        while "judged" not in told:  # noqa: ASYNC110 - by a timer
            await asyncio.sleep(0.01)
    clock.close()
    channel.close()
    theirs.close()
    assert told[:2] == ["heard", "judged"]


async def test_a_supervisor_that_stood_still_ends_nobody_who_had_no_time_to_introduce_himself(home: Home) -> None:
    config, platform, changes = Config(lifecycle=LifecycleConfig(adopt_s=0.5)), current_platform(), Changes()
    host = Host(home, config, platform, Journal(home.state / "events.jsonl"), changes.ring)
    managed = host.add("slot", worker_policy(config.lifecycle), model="model")
    host.feed(managed, ev.Want())
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"]) as process:  # noqa: ASYNC220
        try:
            started = platform.process_started(process.pid)
            assert started is not None
            expected = ChildRecord(slot="slot", model="model", incarnation=1, pid=process.pid, started=started)
            adopting = asyncio.create_task(adoption.adopt(host, changes, [expected], ()))
            await asyncio.sleep(0.01)
            time.sleep(1.0)  # noqa: ASYNC251 - all of this machine stands still
            await asyncio.sleep(0.1)
            host.adopt(managed, process.pid, 1, Phase.IDLE)
            await asyncio.wait_for(adopting, 20)
            assert process.poll() is None
        finally:
            host.close()
            process.kill()
