"""Requests that take long to prepare."""

import threading
from queue import SimpleQueue
from typing import Any

import pytest

from protocol.data import Accepted, ChatMessage, Kind, Refused, Sampling, Submit
from protocol.errors import LmxError
from worker.detok import AnswerText, StopStrings, TokenText
from worker.entry import Limits
from worker.intake import Intake
from worker.jobs import Event, Pace, Prepared, Readied
from worker.requests import Book

GATEWAY = b"g"


class World:
    """A book and its intake; texts that begin with "slow" wait for `go`, "bad" is refused."""

    def __init__(self, slots: int = 2, queue_depth: int = 2) -> None:
        self.go = threading.Event()
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.sent: list[Any] = []
        self.prepared_by: dict[int, str] = {}
        self.intake = Intake(self.prepare, self.pace, self.events.put)
        self.book = Book(
            Limits(slots, queue_depth, 10.0), 1, self.intake.prepare, send=lambda _, message: self.sent.append(message),
            command=lambda _: None,
        )  # fmt: skip

    def pace(self, submit: Submit) -> Pace:
        text = submit.messages[0].content
        return Pace.QUICK if "quick" in text else Pace.GRAMMAR if "schema" in text else Pace.LONG_TEXT

    def prepare(self, submit: Submit) -> Prepared:
        self.prepared_by[submit.rid] = threading.current_thread().name
        text = submit.messages[0].content
        if text.startswith("slow"):
            assert self.go.wait(30)
        if text.startswith("bad"):
            raise LmxError("invalid_value", "bad", param="messages")
        if text.startswith("broken"):
            raise ZeroDivisionError
        return Prepared([1], 5, AnswerText(TokenText(lambda _: "", frozenset()), StopStrings(())))

    def submit(self, rid: int, text: str, now: float = 0.0, deadline_s: float = 60.0) -> None:
        submit = Submit(1, rid, Kind.CHAT, [ChatMessage("user", text)], Sampling(), deadline_s)
        self.intake.submit(self.book, GATEWAY, submit, now)

    def readied(self, now: float = 0.0) -> None:
        happened = self.events.get(timeout=30)
        assert isinstance(happened, Readied)
        self.intake.readied(self.book, happened.unready, now)

    def answers(self) -> dict[int, str]:
        return {m.rid: m.code if isinstance(m, Refused) else type(m).__name__ for m in self.sent}


def test_the_quick_overtake_the_slow_and_nobody_waits_for_them() -> None:
    world = World()
    world.submit(1, "slow")
    world.submit(2, "quick")
    assert world.answers() == {2: "Accepted"}
    assert world.intake.pending == 1
    world.go.set()
    world.readied()
    assert world.answers() == {2: "Accepted", 1: "Accepted"}
    assert world.intake.pending == 0
    assert world.prepared_by == {1: "prepare", 2: threading.current_thread().name}


def test_requests_of_one_pace_keep_their_order_and_do_not_hold_up_the_other() -> None:
    world = World(slots=20)
    world.submit(1, "slow schema")
    for rid in range(2, 12):
        world.submit(rid, "long")
    for _ in range(10):
        world.readied()
    assert [message.rid for message in world.sent] == list(range(2, 12))
    world.go.set()
    world.readied()
    assert world.sent[-1].rid == 1


def test_a_refusal_is_told_like_any_other() -> None:
    world = World()
    world.submit(1, "bad")
    world.readied()
    assert world.answers() == {1: "invalid_value"}
    assert (world.book.running, world.book.waiting, world.intake.pending) == (0, 0, 0)


def test_a_bug_is_raised_where_it_ends_the_process() -> None:
    world = World()
    world.submit(1, "broken")
    with pytest.raises(ZeroDivisionError):
        world.readied()


def test_what_is_aborted_meanwhile_is_not_taken() -> None:
    world = World()
    world.submit(1, "slow")
    world.submit(2, "slow")
    world.intake.abort(GATEWAY, [1])
    world.intake.forget_gateway(GATEWAY)
    assert world.intake.pending == 0
    world.go.set()
    world.submit(3, "later")
    while 3 not in world.answers():
        world.readied()
    assert world.answers() == {3: "Accepted"}


def test_what_is_prepared_counts_as_waiting() -> None:
    world = World(slots=1, queue_depth=2)
    world.submit(1, "quick")
    world.submit(2, "slow")
    world.submit(3, "slow")
    world.submit(4, "slow")
    assert world.answers() == {1: "Accepted", 4: "server_busy"}
    world.submit(2, "slow")  # a second time: not a second request
    assert world.intake.pending == 2
    world.go.set()


def test_an_empty_worker_prepares_only_so_many_at_once() -> None:
    world = World(slots=1, queue_depth=1)
    for rid in range(1, 5):
        world.submit(rid, "slow")
    assert world.answers() == {3: "server_busy", 4: "server_busy"}
    world.go.set()


def test_the_time_of_preparing_counts() -> None:
    world = World()
    world.submit(1, "slow", now=0.0, deadline_s=5.0)
    world.submit(2, "slow", now=0.0, deadline_s=50.0)
    world.go.set()
    world.readied(now=6.0)
    world.readied(now=6.0)
    assert world.answers() == {1: "timeout", 2: "Accepted"}
    assert [type(message) for message in world.sent if message.rid == 2] == [Accepted]
    assert world.book.next_expiry <= 50.0


def test_a_closed_book_takes_nothing_that_becomes_ready() -> None:
    world = World()
    world.submit(1, "slow")
    world.book.close_admission(LmxError("model_restarting", "ending"), 0.0)
    world.go.set()
    world.readied()
    assert world.answers() == {1: "model_restarting"}


def test_where_the_system_gives_no_thread_the_request_is_refused_and_the_next_one_may_have_luck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    world = World()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        world.submit(1, "long")
    assert world.answers() == {1: "server_busy"}
    assert world.intake.pending == 0
    world.submit(2, "long")
    world.readied()
    assert world.answers() == {1: "server_busy", 2: "Accepted"}
