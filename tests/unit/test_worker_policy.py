"""Admission, slots, deadlines and unsent text, with a virtual clock and no sockets."""

import random
from typing import Any

import pytest

from protocol.data import (
    Abort,
    Accepted,
    ChatMessage,
    Delta,
    Failed,
    Finish,
    Kind,
    Refused,
    Sampling,
    Step,
    Submit,
    Usage,
)
from protocol.errors import LmxError
from protocol.states import WorkerExit
from worker.detok import AnswerText, StopStrings, TokenText
from worker.entry import Limits
from worker.failures import classify, describe
from worker.jobs import AT_LENGTH, AT_STOP, GOES_ON, Job, Prepared, Remove, Stepped
from worker.outbox import MAX_UNSENT_BYTES, MAX_UNSENT_MESSAGES, Outbox, OutboxFullError
from worker.requests import NEVER, Book

INCARNATION = 7
GATEWAY = b"gw"


def submit(rid: int, **sampling: Any) -> Submit:
    deadline_s = sampling.pop("deadline_s", 100.0)
    return Submit(INCARNATION, rid, Kind.CHAT, [ChatMessage("user", "secret words")], Sampling(**sampling), deadline_s)


class Desk:
    """A book with everything it says written down."""

    def __init__(self, slots: int = 2, queue_depth: int = 2, slot_timeout_s: float = 10.0) -> None:
        self.sent: list[tuple[bytes, Any]] = []
        self.commands: list[Any] = []
        self.prepared = 0
        self.book = Book(
            Limits(slots, queue_depth, slot_timeout_s),
            INCARNATION,
            self.prepare,
            send=lambda gateway, message: self.sent.append((gateway, message)),
            command=self.commands.append,
        )

    def prepare(self, message: Submit) -> Prepared:
        self.prepared += 1
        if message.messages[0].content == "bad":
            raise LmxError("context_length_exceeded", "too long", param="messages")
        text = TokenText(lambda tokens: "".join(chr(token) for token in tokens), frozenset())
        limit = message.sampling.max_tokens or 1000
        return Prepared([1, 2, 3], limit, AnswerText(text, StopStrings(message.sampling.stop)))

    def submit(self, *rids: int, now: float = 0.0, gateway: bytes = GATEWAY, **sampling: Any) -> None:
        for rid in rids:
            self.book.submit(gateway, submit(rid, **sampling), now)

    def step(self, number: int, text_of: dict[int, str], end: int = GOES_ON, now: float = 1.0) -> None:
        self.book.on_steps([Stepped(number, [(job, ord(text), end) for job, text in text_of.items()])], now)

    def take(self) -> list[Any]:
        sent, self.sent = [message for _, message in self.sent], []
        return sent

    def jobs(self) -> list[int]:
        return [command.id for command in self.commands if isinstance(command, Job)]

    def removed(self) -> list[int]:
        return [job for command in self.commands if isinstance(command, Remove) for job in command.jobs]


def test_requests_take_slots_in_order_then_wait_then_are_refused() -> None:
    desk = Desk(slots=2, queue_depth=2)
    desk.submit(1, 2, 3, 4, 5)
    accepted = [message.rid for message in desk.take()[:2]]
    assert accepted == [1, 2]
    assert (desk.book.running, desk.book.waiting) == (2, 2)
    assert desk.prepared == 4  # the refused one was not even tokenized


def test_a_full_queue_is_refused_as_busy_with_a_time_to_come_back() -> None:
    desk = Desk(slots=1, queue_depth=0)
    desk.submit(1, 2)
    accepted, refused = desk.take()
    assert (accepted, refused.rid) == (Accepted(INCARNATION, 1, 3), 2)
    assert (refused.code, refused.retry_after_s) == ("server_busy", 5)


def test_the_next_in_line_gets_the_slot_when_one_ends() -> None:
    desk = Desk(slots=1)
    desk.submit(1, 2, 3)
    desk.take()
    desk.step(1, {1: "a"}, AT_STOP)
    step, accepted = desk.take()
    assert step.deltas == [Delta(1, "", [97], Finish.STOP, Usage(3, 1))]
    assert accepted.rid == 2
    assert desk.jobs() == [1, 2]


def test_one_message_per_gateway_and_step() -> None:
    desk = Desk(slots=4)
    desk.submit(1, 2, gateway=b"a")
    desk.submit(1, gateway=b"b")
    desk.sent.clear()
    desk.step(5, {1: "x", 2: "y", 3: "z"})
    assert desk.sent == [
        (b"a", Step(INCARNATION, 5, [Delta(1, "x", [120]), Delta(2, "y", [121])])),
        (b"b", Step(INCARNATION, 5, [Delta(1, "z", [122])])),
    ]


def test_a_stop_string_ends_the_request_and_removes_it_from_the_engine() -> None:
    desk = Desk()
    desk.submit(1, stop=("ND",))
    desk.take()
    for number, letter in enumerate("ENDX"):
        desk.step(number, {1: letter})
    deltas = [message.deltas[0] for message in desk.take()]
    assert "".join(delta.text for delta in deltas) == "E"
    assert (deltas[-1].finish, deltas[-1].usage) == (Finish.STOP, Usage(3, 3))
    assert len(deltas) == 3
    assert desk.removed() == [1]


def test_text_held_for_a_stop_string_comes_out_at_the_end() -> None:
    desk = Desk()
    desk.submit(1, stop=("END",))
    desk.take()
    desk.step(1, {1: "E"})
    desk.step(2, {1: "N"}, AT_LENGTH)
    first, last = (message.deltas[0] for message in desk.take())
    assert (first.text, first.token_ids) == ("", [ord("E")])
    assert (last.text, last.finish, last.usage) == ("EN", Finish.LENGTH, Usage(3, 2))


def test_an_aborted_request_frees_its_slot_at_once_and_hears_nothing_more() -> None:
    desk = Desk(slots=1)
    desk.submit(1, 2)
    desk.take()
    desk.book.abort(GATEWAY, Abort(INCARNATION, [1, 99]), 1.0)
    assert [type(command).__name__ for command in desk.commands] == ["Job", "Remove", "Job"]  # in this order
    assert [message.rid for message in desk.take()] == [2]
    desk.step(1, {1: "a", 2: "b"})
    (step,) = desk.take()
    assert [delta.rid for delta in step.deltas] == [2]


def test_an_abort_of_a_waiting_request_costs_the_engine_nothing() -> None:
    desk = Desk(slots=1)
    desk.submit(1, 2)
    desk.book.abort(GATEWAY, Abort(INCARNATION, [2]), 1.0)
    assert (desk.book.running, desk.book.waiting, desk.removed()) == (1, 0, [])


def test_another_gateway_cannot_abort_my_request() -> None:
    desk = Desk()
    desk.submit(1)
    desk.book.abort(b"other", Abort(INCARNATION, [1]), 1.0)
    assert desk.book.running == 1


def test_waiting_too_long_for_a_slot_is_refused_as_busy() -> None:
    desk = Desk(slots=1, slot_timeout_s=10)
    desk.submit(1)
    desk.submit(2, now=3.0)
    desk.take()
    assert desk.book.next_expiry <= 13.0
    desk.book.expire(12.9)
    assert desk.take() == []
    desk.book.expire(13.0)
    (refused,) = desk.take()
    assert (refused.rid, refused.code) == (2, "server_busy")
    assert desk.book.next_expiry == 100.0


def test_a_deadline_ends_a_request_wherever_it_is() -> None:
    desk = Desk(slots=1, slot_timeout_s=1000)
    desk.submit(1, deadline_s=5.0)
    desk.submit(2, deadline_s=4.0)
    desk.take()
    desk.book.expire(5.0)
    refused, failed = desk.take()
    assert isinstance(refused, Refused)
    assert isinstance(failed, Failed)
    assert (refused.rid, failed.rid) == (2, 1)
    assert refused.code == failed.code == "timeout"
    assert desk.removed() == [1]
    assert desk.book.next_expiry == NEVER


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, float("nan")])
def test_a_deadline_that_has_passed_is_told_at_once(deadline_s: float) -> None:
    desk = Desk()
    desk.submit(1, deadline_s=deadline_s)
    (refused,) = desk.take()
    assert refused.code == "timeout"


def test_a_request_that_cannot_be_prepared_is_refused_and_takes_no_slot() -> None:
    desk = Desk()
    bad = Submit(INCARNATION, 1, Kind.CHAT, [ChatMessage("user", "bad")], Sampling(), 10.0)
    desk.book.submit(GATEWAY, bad, 0.0)
    assert desk.take() == [Refused(INCARNATION, 1, "context_length_exceeded", "too long", "messages")]
    assert desk.book.running == 0


def test_a_repeated_rid_is_ignored_while_the_first_runs() -> None:
    desk = Desk()
    desk.submit(1, 1)
    assert desk.jobs() == [1]


def test_a_gateway_that_is_gone_takes_all_its_requests_with_it() -> None:
    desk = Desk(slots=2, queue_depth=4)
    desk.submit(1, 2, 3, gateway=b"gone")
    desk.submit(1, gateway=b"there")
    desk.sent.clear()
    desk.book.forget_gateway(b"gone", 1.0)
    assert [(gateway, message.rid) for gateway, message in desk.sent] == [(b"there", 1)]
    assert sorted(desk.removed()) == [1, 2]
    assert desk.book.gateways == {b"there"}


def test_closing_admission_refuses_what_waits_and_comes_and_lets_run_what_runs() -> None:
    desk = Desk(slots=1)
    desk.submit(1, 2)
    desk.take()
    desk.book.close_admission(LmxError("model_restarting", "going"), 1.0)
    desk.submit(3)
    assert [(message.rid, message.code) for message in desk.take()] == [
        (2, "model_restarting"),
        (3, "model_restarting"),
    ]
    desk.step(1, {1: "a"}, AT_STOP)
    assert (desk.book.running, desk.book.waiting) == (0, 0)


def test_fail_all_ends_everything_by_its_right_message() -> None:
    desk = Desk(slots=1)
    desk.submit(1, 2)
    desk.take()
    desk.book.fail_all(LmxError("worker_crashed", "crashed"), 1.0, retryable=True)
    refused, failed = desk.take()
    assert isinstance(refused, Refused)
    assert failed == Failed(INCARNATION, 1, "worker_crashed", "crashed", True)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_slots_and_answers_add_up(seed: int) -> None:
    """Random schedules: never more running than slots, every request ends exactly once, the engine agrees."""
    rng = random.Random(seed)
    slots, depth = rng.randint(1, 4), rng.randint(0, 4)
    desk = Desk(slots, depth, slot_timeout_s=5.0)
    engine: set[int] = set()
    now, step = 0.0, 0
    for rid in range(300):
        now += rng.random()
        match rng.randrange(5):
            case 0 | 1:
                desk.submit(rid, now=now, deadline_s=rng.uniform(0.5, 20))
            case 2:
                desk.book.abort(GATEWAY, Abort(INCARNATION, [rng.randrange(rid + 1)]), now)
            case 3 if now >= desk.book.next_expiry:
                desk.book.expire(now)
            case _:
                step += 1
                ends = {job: rng.choice([GOES_ON, GOES_ON, AT_STOP, AT_LENGTH]) for job in engine}
                engine -= {job for job, end in ends.items() if end != GOES_ON}
                desk.book.on_steps([Stepped(step, [(job, 97, end) for job, end in ends.items()])], now)
        for command in desk.commands:
            engine = engine | {command.id} if isinstance(command, Job) else engine - set(command.jobs)
            assert len(engine) <= slots
        desk.commands.clear()
        assert len(engine) == desk.book.running <= slots
        assert desk.book.waiting <= depth
    desk.book.expire(now + 1000)
    assert (desk.book.running, desk.book.waiting, desk.book.gateways) == (0, 0, set())
    ends_of = [message.rid for message in desk.take() if isinstance(message, Refused | Failed)]
    assert len(ends_of) == len(set(ends_of))


# -- unsent text --------------------------------------------------------------------------------------------------


def delta_step(number: int, rid: int, text: str, finish: Finish | None = None) -> Step:
    return Step(INCARNATION, number, [Delta(rid, text, [number], finish)])


def drained(outbox: Outbox) -> list[Any]:
    messages = []
    while outbox:
        messages.append(outbox.head(INCARNATION))
        outbox.pop()
    return messages


def test_unsent_deltas_are_merged_per_request_and_keep_the_order_that_matters() -> None:
    outbox = Outbox()
    for message in (
        Accepted(INCARNATION, 1, 3),
        delta_step(1, 1, "a"),
        delta_step(2, 2, "x"),
        delta_step(3, 1, "b"),
        Failed(INCARNATION, 2, "timeout", "late"),
        Accepted(INCARNATION, 3, 3),
        delta_step(4, 1, "c", Finish.STOP),
    ):
        assert outbox.add(message) == []
    assert drained(outbox) == [
        Accepted(INCARNATION, 1, 3),
        Accepted(INCARNATION, 3, 3),
        Step(INCARNATION, 4, [Delta(1, "abc", [1, 3, 4], Finish.STOP)]),
        Step(INCARNATION, 2, [Delta(2, "x", [2])]),
        Failed(INCARNATION, 2, "timeout", "late"),
    ]


def test_an_answer_nobody_reads_is_given_up_at_its_limit() -> None:
    outbox = Outbox()
    text = "é" * (MAX_UNSENT_BYTES // 8)
    assert [outbox.add(delta_step(number, 1, text)) for number in range(4)] == [[], [], [], [1]]
    assert not outbox


def test_a_gateway_that_floods_and_does_not_read_is_given_up() -> None:
    outbox = Outbox()
    refused = Refused(INCARNATION, 1, "server_busy", "busy")
    for _ in range(MAX_UNSENT_MESSAGES):
        outbox.add(refused)
    with pytest.raises(OutboxFullError):
        outbox.add(refused)


def test_an_aborted_request_leaves_nothing_unsent() -> None:
    outbox = Outbox()
    outbox.add(delta_step(1, 1, "a"))
    outbox.forget(1)
    assert not outbox


# -- exit codes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (…OutOfMemory)"), 87),
        (RuntimeError("[METAL] Command buffer execution failed: Caused GPU Timeout Error"), 86),
        (RuntimeError("[metal::malloc] Attempting to allocate 9 bytes … maximum allowed buffer size of 8"), 88),
        (RuntimeError("[metal::malloc] Resource limit (499000) exceeded."), 88),
        (RuntimeError("[malloc_or_wait] Unable to allocate 9 bytes."), 88),
        (MemoryError(), 88),
        (RuntimeError("[matmul] shapes differ"), 70),
        (KeyError("user text"), 70),
    ],
)
def test_exceptions_have_exit_codes(error: Exception, code: int) -> None:
    assert classify(error) is WorkerExit(code)


def test_words_for_the_operator_quote_mlx_and_nothing_else() -> None:
    assert describe(RuntimeError("[matmul] shapes differ")) == "RuntimeError: [matmul] shapes differ"
    assert describe(ValueError("what the user wrote")) == "ValueError"
    assert describe(RuntimeError("what the user wrote")) == "RuntimeError"
    assert len(describe(RuntimeError("[x]" + "y" * 10_000))) < 400
