"""Fewer requests at once while the machine's memory runs short: the policy, and the worker's part."""

from collections.abc import Iterable
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from protocol.config import MemoryConfig
from protocol.control import Relieve
from protocol.data import Abort, Accepted
from supervisor.concurrency import Concurrency, adapt, slots
from tests.unit.test_worker_policy import GATEWAY, INCARNATION, Desk
from worker.jobs import AT_STOP
from worker.relief import Relief

CONFIG = MemoryConfig()
SAMPLE_S = 0.25


def shares(used: Iterable[float | None]) -> list[float]:
    seen, found, now = Concurrency(), [], 0.0
    for each in used:
        seen = adapt(seen, each, CONFIG, now)
        found.append(seen.share)
        now += SAMPLE_S
    return found


def seconds(used: float | None, count: float) -> list[float | None]:
    return [used] * int(count / SAMPLE_S)


def test_fewer_run_at_70_90_70_percent_and_then_all_again() -> None:
    found = shares([*seconds(0.7, 3), *seconds(0.9, 3), *seconds(0.7, 20)])
    assert set(found[:12]) == {1.0}
    assert found[12:14] == [1.0, 0.5], "two samples"
    assert set(found[13:24]) == {0.5}
    rising = found[24:]
    assert sorted(set(rising)) == [0.5, 0.625, 0.75, 0.875, 1.0], "an eighth at a time"
    assert rising == sorted(rising)
    assert rising[-1] == 1.0
    assert rising.count(0.625) == 2 / SAMPLE_S


def test_just_below_the_mark_for_shedding_an_eighth_of_the_slots_is_left_and_never_none() -> None:
    assert shares(seconds(0.949, 1))[-1] == 0.125
    assert shares(seconds(1.0, 1))[-1] == 0.125
    assert [slots(Concurrency(0.125), configured) for configured in (1, 4, 8, 9, 32)] == [1, 1, 1, 2, 4]
    assert slots(Concurrency(), 32) == 0, "all that are configured"


def test_one_sample_changes_nothing_and_an_unknown_one_neither() -> None:
    assert set(shares([0.7, 0.94, 0.7, 0.94, 0.7])) == {1.0}
    assert shares([*seconds(0.9, 1), *seconds(None, 60)])[-1] == 0.5


def test_at_the_edge_of_a_step_it_does_not_flap() -> None:
    edge = 0.85 + 0.1 * 4 / 8
    found = shares([edge + (0.004 if number % 4 < 2 else -0.004) for number in range(400)])
    assert len({*found[10:]}) == 1


def test_marks_that_leave_nothing_between_them_switch_it_off() -> None:
    seen = Concurrency()
    for now in range(10):
        seen = adapt(seen, 0.94, MemoryConfig(slow=1.0), float(now))
    assert seen.share == 1.0


@given(st.lists(st.one_of(st.none(), st.floats(0, 1.2)), max_size=200))
def test_the_share_is_always_some_eighths_and_rises_by_one_at_most(used: list[float | None]) -> None:
    found = [1.0, *shares(used)]
    for before, after in pairwise(found):
        assert after * 8 in range(1, 9)
        assert after <= before + 1 / 8


def test_a_worker_with_fewer_slots_lets_run_what_runs_and_gives_them_back() -> None:
    desk, relief = Desk(slots=4, queue_depth=4), Relief()
    desk.submit(1, 2, 3, 4, 5)
    desk.take()
    relief.ask(Relieve(slots=2, slots_s=5.0), 10.0, desk.book)
    assert (desk.book.slots.limit, desk.book.running, desk.book.waiting) == (2, 4, 1)
    desk.step(1, {1: "a", 2: "b"}, AT_STOP, now=11.0)
    assert (desk.book.running, desk.book.waiting) == (2, 1), "no slot for the next one yet"
    desk.step(2, {3: "a"}, AT_STOP, now=11.0)
    assert [message.rid for message in desk.take() if isinstance(message, Accepted)] == [5]
    desk.submit(6, 7, now=12.0)
    assert desk.book.waiting == 2
    assert relief.due == 15.0
    relief.expire(15.0, desk.book)
    assert (desk.book.slots.limit, desk.book.running) == (4, 4), "a supervisor that is gone limits nobody"
    assert relief.due == float("inf")


def test_slots_and_pause_are_wishes_of_their_own() -> None:
    desk, relief = Desk(slots=4, queue_depth=4), Relief()
    relief.ask(Relieve(2.0, slots=1, slots_s=5.0), 0.0, desk.book)
    assert desk.book.slots.paused
    relief.expire(2.0, desk.book)
    assert (desk.book.slots.paused, desk.book.slots.limit, relief.due) == (False, 1, 5.0)
    desk.submit(1, 2, now=2.0)
    assert desk.book.running == 1
    desk.book.abort(GATEWAY, Abort(INCARNATION, [1]), 3.0)
    relief.ask(Relieve(), 3.0, desk.book)
    assert (desk.book.slots.limit, desk.book.running) == (4, 1)


def test_a_wish_that_came_before_the_model_was_ready_counts_for_it() -> None:
    desk, relief = Desk(slots=4), Relief()
    relief.ask(Relieve(slots=1, slots_s=5.0), 0.0, None)
    relief.apply(desk.book, 1.0)
    desk.submit(1, 2)
    assert desk.book.running == 1
