"""The cache that is promised to requests before their prompts are processed."""

import random
from typing import Any

import msgspec
import pytest

from protocol.data import Accepted, Failed, Refused, Resume
from protocol.errors import LmxError
from protocol.kvsize import KvShape
from tests.unit.test_worker_policy import GATEWAY, INCARNATION, Desk, submit
from worker.detok import AnswerText, StopStrings, TokenText
from worker.entry import Limits
from worker.jobs import AT_STOP, GOES_ON, Prepared
from worker.requests import Book
from worker.room import OPEN_ENDED_TOKENS, STEP_TOKENS, Room

PLAIN = KvShape(token_bytes=100)
WINDOWED = KvShape(token_bytes=10, windowed_bytes=90, window=512, state_bytes=1000)


class MemoryDesk(Desk):
    """A desk whose worker has cache for so many tokens of 100 bytes. Every prompt has 3 tokens."""

    def __init__(self, tokens: int, slots: int = 32, context: int = 100_000, queue_depth: int = 8) -> None:
        super().__init__(slots, queue_depth)
        self.context = context
        self.room = Room(PLAIN, tokens * PLAIN.token_bytes)
        self.book = Book(
            Limits(slots, queue_depth, 10.0),
            INCARNATION,
            self.prepare,
            send=lambda gateway, message: self.sent.append((gateway, message)),
            command=self.commands.append,
            room=self.room,
        )

    def prepare(self, message: Any) -> Prepared:
        text = TokenText(lambda tokens: "".join(chr(token) for token in tokens), frozenset())
        limit = message.sampling.max_tokens or self.context
        return Prepared([1, 2, 3], limit, AnswerText(text, StopStrings(message.sampling.stop)))


def test_the_longest_sequence_counts_for_all_in_steps_of_the_cache() -> None:
    room = Room(PLAIN, 4 * 512 * 100)
    for job, tokens in enumerate((10, 300, 512)):
        assert room.fits(tokens)
        room.take(job, tokens)
    assert room.reserved == 3 * 512 * 100
    assert room.fits(512)
    assert not room.fits(513), "it would make all four as long as itself"
    room.release(2)
    room.release(2)
    room.release(99)
    assert room.reserved == 2 * 512 * 100
    room.release(1)
    assert room.reserved == STEP_TOKENS * 100


@pytest.mark.parametrize("shape", [PLAIN, WINDOWED, KvShape(windowed_bytes=100, window=512), KvShape(state_bytes=1000)])
@pytest.mark.parametrize("budget", [999, 1000, 5_000, 26_600, 51_200, 60_000, 1_000_000])
def test_the_longest_that_fits_alone_fits_and_one_token_more_does_not(shape: KvShape, budget: int) -> None:
    room = Room(shape, budget)
    most = room.most_tokens
    if most is None:
        assert room.fits(10**9)
    else:
        assert most == 0 or room.fits(most)
        assert not room.fits(most + 1)


def test_without_a_budget_everything_is_promised() -> None:
    room = Room(PLAIN, 0)
    assert room.most_tokens is None
    assert room.fits(10**12)


def test_what_can_never_fit_is_refused_with_need_and_limit_in_words() -> None:
    desk = MemoryDesk(tokens=1024)
    desk.submit(1, max_tokens=1022)
    (refused,) = desk.take()
    assert (refused.code, refused.param, refused.retry_after_s) == ("request_too_large", "max_tokens", None)
    assert "3 tokens and up to 1022 of answer" in refused.message
    assert "for 1024 tokens" in refused.message
    assert (desk.book.running, desk.book.waiting, desk.room.reserved) == (0, 0, 0)
    desk.submit(2, max_tokens=1021)
    assert isinstance(desk.take()[0], Accepted)


def test_what_does_not_fit_now_waits_for_memory_and_is_then_refused_as_busy() -> None:
    desk = MemoryDesk(tokens=2048)
    desk.submit(1, 2, 3, max_tokens=1000)
    assert [message.rid for message in desk.take()] == [1, 2]
    assert (desk.book.running, desk.book.waiting) == (2, 1)
    desk.step(1, {1: "a"}, AT_STOP)
    assert [message.rid for message in desk.take() if isinstance(message, Accepted)] == [3]
    desk.submit(4, now=2.0, max_tokens=1000)
    desk.book.expire(12.0)
    (refused,) = desk.take()
    assert (refused.rid, refused.code, refused.retry_after_s) == (4, "server_busy", 5)
    assert "memory" in refused.message
    assert desk.jobs() == [1, 2, 3], "the engine never heard of it"


def test_a_small_one_may_overtake_a_large_one_that_does_not_fit() -> None:
    desk = MemoryDesk(tokens=2048)
    desk.submit(1, max_tokens=250)
    desk.submit(2, max_tokens=1500)
    desk.submit(3, max_tokens=250)
    assert [message.rid for message in desk.take()] == [1]  # the same client's stay in their order
    other = msgspec.structs.replace(submit(4, max_tokens=250), client="other")
    desk.book.submit(GATEWAY, other, 0.0)
    assert [message.rid for message in desk.take()] == [4]


def test_an_answer_of_open_length_is_promised_more_as_it_grows() -> None:
    desk = MemoryDesk(tokens=8192)
    desk.submit(1)
    first = desk.room.reserved
    assert first == 5 * STEP_TOKENS * 100  # 3 tokens and 1,024
    for number in range(OPEN_ENDED_TOKENS + 1):
        desk.step(number, {1: "a"})
    assert first < desk.room.reserved <= first + STEP_TOKENS * 100
    desk.book.abort(GATEWAY, msgspec.structs.replace(abort(), rids=[1]), 5.0)
    assert desk.room.reserved == 0


def test_an_answer_of_open_length_ends_where_the_memory_does() -> None:
    desk = MemoryDesk(tokens=1024)
    desk.submit(1)
    assert desk.commands[0].max_tokens == 1021
    for number in range(1021):
        desk.step(number, {1: "a"})
    assert desk.room.reserved <= 1024 * 100


def test_what_a_crashed_process_had_admitted_is_never_too_large() -> None:
    desk = MemoryDesk(tokens=1024)
    resumed = msgspec.structs.replace(submit(1, max_tokens=1500), resume=Resume([65] * 600))
    desk.book.submit(GATEWAY, resumed, 0.0)
    assert isinstance(desk.take()[0], Accepted)
    assert desk.commands[0].max_tokens == 900
    assert desk.room.reserved == 1024 * 100


def abort() -> Any:
    from protocol.data import Abort

    return Abort(INCARNATION, [])


@pytest.mark.parametrize("seed", range(20))
def test_every_promise_is_taken_back_exactly_once_whatever_ends_a_request(seed: int) -> None:
    rng = random.Random(seed)
    desk = MemoryDesk(tokens=4096, slots=rng.randint(1, 12))
    now, step = 0.0, 0
    for rid in range(1, 300):
        now += rng.random()
        match rng.randrange(7):
            case 0 | 1 | 2:
                wanted = submit(rid, max_tokens=rng.choice([None, 50, 400, 3000, 9000]), deadline_s=rng.uniform(1, 9))
                more: dict[str, Any] = {"client": rng.choice("abc"), "priority": rng.choice([-1, 0, 1])}
                if not rng.randrange(5):
                    more["resume"] = Resume([65] * rng.randrange(40))
                desk.book.submit(rng.choice([b"x", b"y"]), msgspec.structs.replace(wanted, **more), now)
            case 3:
                desk.book.abort(
                    rng.choice([b"x", b"y"]), msgspec.structs.replace(abort(), rids=[rng.randrange(rid)]), now
                )
            case 4:
                desk.book.expire(now)
            case 5 if not rng.randrange(10):
                desk.book.forget_gateway(rng.choice([b"x", b"y"]), now)
            case _:
                step += 1
                running = list(desk.book._running)
                ends = {job: rng.choice([GOES_ON, AT_STOP]) for job in running}
                for job, end in ends.items():
                    desk.step(step, {job: "a"}, end, now)
        assert desk.room.reserved <= desk.room.budget
        assert desk.book.running == len(desk.room._tokens)
        assert desk.book.running <= desk.book.slots.limit
        assert desk.book.waiting == len(desk.book.slots._line)
    desk.book.fail_all(LmxError("worker_crashed", "crashed"), now, retryable=True)
    assert desk.room.reserved == 0
    assert desk.book.waiting == desk.book.running == 0
    ends = [message.rid for message in desk.take() if isinstance(message, Refused | Failed)]
    assert len(ends) == len(set(ends))
