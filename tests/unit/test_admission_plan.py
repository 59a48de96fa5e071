"""What admission asks of the ledger about a model that is there already."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.config import Config
from protocol.control import Heartbeat
from protocol.paths import Home
from protocol.states import Phase
from supervisor import events as ev
from supervisor.admission import Admission
from supervisor.host import Host
from supervisor.journal import Journal
from supervisor.ledger import Machine
from supervisor.managed import Managed
from supervisor.platform import current_platform
from supervisor.prediction import History
from supervisor.restarts import worker_policy
from supervisor.watching import Changes

MIB = 1024**2
TOTAL = 10 * 1024 * MIB
#: Below this the machine sheds: nobody is loaded into it.
SPARE = TOTAL // 20


@pytest.fixture
def host() -> Iterator[Host]:
    with tempfile.TemporaryDirectory(prefix="lmx-", dir="/tmp") as folder:
        home = Home(Path(folder))
        home.ensure()
        host = Host(home, Config(), current_platform(), Journal(home.state / "events.jsonl"), lambda: None)
        yield host
        host.close()


def running(host: Host, model: str, path: Path) -> Managed:
    managed = host.add(model, worker_policy(host.config.lifecycle), model=model, path=str(path))
    for event in (ev.Want(), ev.Started(99_999, 1), ev.BecameReady(1.0)):
        host.feed(managed, event)
    return managed


async def test_what_a_loaded_model_has_would_be_free_for_it_and_for_nobody_else(
    host: Host, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    admission = Admission(host, Changes(), History(host.home.state / "memory"), lambda _model: None)
    monkeypatch.setattr(host.meter, "machine", lambda: Machine(TOTAL, SPARE + 20 * MIB))
    running(host, "here", tiny_model).memory_bytes = 60 * MIB
    again, other = await admission.fit("here", tiny_model), await admission.fit("other", tiny_model)
    assert (again["fits"], again["available_bytes"]) == (True, 80 * MIB)
    assert (other["fits"], other["available_bytes"]) == (False, 20 * MIB)


async def test_a_model_is_busy_from_the_moment_its_worker_says_so(host: Host, tiny_model: Path) -> None:
    admission = Admission(host, Changes(), History(host.home.state / "memory"), lambda _model: None)
    managed = running(host, "here", tiny_model)
    assert admission.use_of(managed).evictable
    managed.heartbeat = Heartbeat(Phase.IDLE, 1, 0.0, 0, 1, 0, 0, 0)
    assert not admission.use_of(managed).evictable
