"""What a worker does about memory: the limits it gives MLX, buffers given back, admission paused."""

from queue import Queue
from typing import Any

import msgspec
import pytest

from protocol.data import Accepted, Refused, Resume
from protocol.spec import MemoryLimits
from protocol.states import WorkerExit
from tests.unit.test_worker_policy import GATEWAY, Desk, submit
from worker.engine import Engine
from worker.jobs import Command, End, Relieve, Status
from worker.loading import keep_to, relieve


class Mx:
    """What is asked of MLX, written down."""

    def __init__(self, kept: int = 0) -> None:
        self.kept = kept
        self.asked: list[tuple[str, int]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "Mx":
        import mlx.core as mx

        for name in ("set_memory_limit", "set_cache_limit", "set_wired_limit"):
            monkeypatch.setattr(mx, name, lambda value, name=name: self.asked.append((name, value)))
        monkeypatch.setattr(mx, "get_cache_memory", lambda: self.kept)
        monkeypatch.setattr(mx, "clear_cache", lambda: self.asked.append(("clear_cache", 0)))
        return self


def test_mlx_is_told_the_limits_of_the_ledger_and_nothing_is_wired(monkeypatch: pytest.MonkeyPatch) -> None:
    mx = Mx().install(monkeypatch)
    keep_to(MemoryLimits(memory_bytes=1000, buffer_bytes=100))
    assert mx.asked == [("set_memory_limit", 1000), ("set_cache_limit", 100)]
    mx.asked.clear()
    keep_to(MemoryLimits())
    assert mx.asked == [], "0 leaves MLX's own"


@pytest.mark.parametrize(("kept", "cleared"), [(0, False), (100, False), (101, True)])
def test_buffers_are_given_back_above_their_size(monkeypatch: pytest.MonkeyPatch, kept: int, cleared: bool) -> None:
    mx = Mx(kept).install(monkeypatch)
    relieve(Relieve(100))
    assert bool(mx.asked) == cleared


def test_the_engine_gives_buffers_back_between_steps_and_goes_on() -> None:
    class Idle:
        prefilling = False

        def __len__(self) -> int:
            return 0

    commands: Queue[Command] = Queue()
    asked: list[Relieve] = []
    backend: Any = Idle()
    engine = Engine(backend, commands, lambda _: None, Status(), relieve=asked.append)
    for command in (Relieve(5), Relieve(), End(WorkerExit.ASKED, "")):
        commands.put(command)
    assert engine.run().code is WorkerExit.ASKED
    assert asked == [Relieve(5), Relieve()]


def test_real_mlx_gives_its_buffers_back() -> None:
    import mlx.core as mx

    array = mx.zeros((1024, 1024))
    mx.eval(array)
    del array
    assert mx.get_cache_memory() > 0
    relieve(Relieve())
    assert mx.get_cache_memory() == 0


def test_a_paused_worker_begins_nothing_new_and_goes_on_with_what_it_has() -> None:
    desk = Desk(slots=1, queue_depth=4)
    desk.submit(1, 2)
    assert [type(message) for message in desk.take()] == [Accepted]
    desk.book.pause(1.0, paused=True)
    desk.submit(3, now=1.0)
    (refused,) = desk.take()
    assert isinstance(refused, Refused)
    assert (refused.code, refused.retry_after_s) == ("load_shedding", 10)
    # What began in a process that is gone was admitted long ago: it only waits for its place.
    resumed = msgspec.structs.replace(submit(4), resume=Resume([65]))
    desk.book.submit(GATEWAY, resumed, 1.0)
    assert desk.take() == []
    desk.book.abort(GATEWAY, abort(1), 2.0)
    assert (desk.book.running, desk.book.waiting) == (0, 2), "the one that waited still waits"
    desk.book.pause(3.0, paused=False)
    assert [message.rid for message in desk.take()] == [4], "what began elsewhere goes before what never began"
    assert (desk.book.running, desk.book.waiting) == (1, 1)
    assert desk.book.admitted == 3


def abort(*rids: int) -> Any:
    from protocol.data import Abort

    return Abort(7, list(rids))
