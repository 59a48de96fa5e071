"""Which events wake the IO thread, and which wait for it to look."""

import select
import threading
from collections.abc import Callable, Iterator
from time import monotonic

import pytest

from protocol.states import Phase, WorkerExit
from worker import mailbox
from worker.jobs import AT_LENGTH, GOES_ON, Event, Finished, Status, Stepped, Warming
from worker.mailbox import NEVER, Mailbox

Box = Callable[..., tuple[Mailbox, Status]]


@pytest.fixture
def box() -> Iterator[Box]:
    made: list[Mailbox] = []

    def make(gather_s: float = 10.0) -> tuple[Mailbox, Status]:
        status = Status()
        status.phase = Phase.DECODE
        made.append(Mailbox(status, gather_s))
        return made[-1], status

    yield make
    for mail in made:
        mail.close()


def woken(mail: Mailbox) -> bool:
    return bool(select.select([mail.fileno], [], [], 0)[0])


def step(number: int, end: int = GOES_ON) -> Stepped:
    return Stepped(number, [(1, 5, GOES_ON), (2, 6, end)])


def taken(mail: Mailbox) -> list[Event | list[Stepped]]:
    if woken(mail):
        mail.read_wake_ups()
    return mail.take()


def test_the_first_step_wakes_and_those_that_follow_are_taken_together_when_they_are_due(box: Box) -> None:
    mail, _ = box()
    mail.put(step(1))
    assert woken(mail)
    before = monotonic()
    assert taken(mail) == [[step(1)]]
    assert before + 10 <= mail.due <= monotonic() + 10
    mail.put(step(2))
    mail.put(step(3))
    assert not woken(mail)
    assert taken(mail) == [[step(2), step(3)]]


def test_who_wakes_the_reader_lets_it_begin_and_does_not_wait_for_one_that_is_busy(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    mail, _ = box()
    before = monotonic()
    mail.put(Warming())
    assert monotonic() - before < 10, "nobody reads"
    taken(mail)
    monkeypatch.setattr(mailbox, "_YIELD_S", 60.0)
    begun = []

    def read() -> None:
        select.select([mail.fileno], [], [], 60)
        begun.append(monotonic())
        taken(mail)

    reader = threading.Thread(target=read)
    reader.start()
    before = monotonic()
    mail.put(Warming())
    assert begun
    assert monotonic() - before < 30, "it began"
    reader.join()


@pytest.mark.parametrize(("rows", "times"), [(1, 1), (16, 1), (32, 2), (48, 3), (500, 3)])
def test_the_more_rows_a_step_has_the_longer_the_next_ones_wait(box: Box, rows: int, times: float) -> None:
    mail, _ = box()
    mail.put(Stepped(1, [(row, 5, GOES_ON) for row in range(rows)]))
    before = monotonic()
    taken(mail)
    assert before + 10 * times <= mail.due <= monotonic() + 10 * times


def test_an_end_a_first_token_and_whatever_is_no_step_wake_at_once_and_take_along_what_waited(box: Box) -> None:
    for urgent, phase in ((step(3, AT_LENGTH), Phase.DECODE), (step(3), Phase.PREFILL)):
        mail, status = box()
        mail.put(step(1))
        taken(mail)
        mail.put(step(2))
        status.phase = phase
        mail.put(urgent)
        assert woken(mail)
        assert taken(mail) == [[step(2), urgent]]
    mail, _ = box()
    mail.put(step(1))
    taken(mail)
    mail.put(step(2))
    mail.put(Finished(WorkerExit.ASKED, ""))
    mail.put(step(3))
    assert woken(mail)
    assert taken(mail) == [[step(2)], Finished(WorkerExit.ASKED, ""), [step(3)]]


def test_after_a_pause_the_next_step_wakes_again(box: Box) -> None:
    mail, _ = box()
    mail.put(step(1))
    taken(mail)
    assert taken(mail) == []
    assert mail.due == NEVER
    mail.put(step(2))
    assert woken(mail)


def test_without_gathering_every_step_wakes(box: Box) -> None:
    mail, _ = box(gather_s=0.0)
    for number in range(3):
        mail.put(step(number))
        assert woken(mail)
        assert taken(mail) == [[step(number)]]
        assert mail.due == NEVER


def test_one_byte_wakes_for_any_number_of_events(box: Box) -> None:
    mail, _ = box()
    for _ in range(100_000):
        mail.put(Warming())
    assert mail.read_wake_ups() == {0}
    assert not woken(mail)
    assert len(mail.take()) == 100_000
