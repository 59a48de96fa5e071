"""What the host makes of an end, around the pure policy."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from protocol.config import Config
from protocol.paths import Home
from protocol.states import ModelState
from supervisor import events as ev
from supervisor.host import Host
from supervisor.journal import Journal
from supervisor.platform import current_platform
from supervisor.restarts import worker_policy


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
