"""Limits: what a client may take, what it is told of it, and that counting itself stays small."""

import asyncio
import contextlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import windows
from gateway.auth import Access
from gateway.context import context_of
from gateway.inspection import estimate, wanted_of
from gateway.limits import Budget, Limiter, duration
from gateway.windows import BoundedStorage
from protocol.config import LimitsConfig, SecurityConfig
from protocol.errors import LmxError
from protocol.profiles import rules
from tests.logkit import logged
from tests.security.doorkit import ADMIN_KEY, CHAT, DoorKit


class Clock:
    """Time as `limits` reads it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_800_000_000.0  # the beginning of a minute
        monkeypatch.setattr("time.time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def limiter(**settings: int) -> Limiter:
    return Limiter(rules(SecurityConfig(), LimitsConfig(**settings)))


async def taken(each: Limiter, number: int, client: str = "a", limit: int = 10) -> int:
    """How many of so many requests are granted."""
    granted = 0
    for _ in range(number):
        with contextlib.suppress(LmxError):
            await each.inference(client, Budget(limit, 0, 0), [])
            granted += 1
    return granted


async def test_no_minute_has_more_than_the_limit_wherever_it_begins(clock: Clock) -> None:
    each = limiter()
    clock.now += 50
    assert await taken(each, 15) == 10
    clock.now += 20  # the next window of the clock has begun, but not the next minute of this client
    assert await taken(each, 15) < 5
    clock.now += 120
    assert await taken(each, 15) == 10


@settings(deadline=None)
@given(st.integers(1, 50), st.floats(0, 59.9), st.integers(1, 30), st.floats(0, 119))
async def test_after_the_wait_that_was_told_a_request_is_granted(
    limit: int, begin: float, first: int, later: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        each = limiter()
        clock.now += begin
        await taken(each, first, limit=limit)
        clock.now += later
        await taken(each, limit, limit=limit)
        with pytest.raises(LmxError) as refused:
            await each.inference("a", Budget(limit, 0, 0), [])
        wait = refused.value.retry_after_s
        assert wait is not None
        assert 1 <= wait <= 61
        clock.now += wait
        assert await taken(each, 1, limit=limit) == 1


async def test_the_wait_is_no_longer_than_needed(clock: Clock) -> None:
    each = limiter()
    assert await taken(each, 10) == 10
    with pytest.raises(LmxError) as refused:
        await each.inference("a", Budget(10, 0, 0), [])
    wait = refused.value.retry_after_s
    assert wait is not None
    clock.now += wait - 2
    assert await taken(each, 1) == 0


@pytest.mark.usefixtures("no_minute_ends")
async def test_headers_say_what_is_left_as_openai_does(tmp_path: Path) -> None:
    kit = DoorKit(tmp_path, LimitsConfig(inference_per_minute=2, tokens_per_minute=10_000))
    answers = [await kit.ask(body=b'{"max_tokens": 100}') for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    for name in ("limit-requests", "remaining-requests", "reset-requests"):
        assert all(f"x-ratelimit-{name}" in answer.headers for answer in answers)
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert answers[0].headers["x-ratelimit-limit-tokens"] == "10000"
    assert answers[0].headers["x-ratelimit-remaining-tokens"] == str(10_000 - 105)
    assert answers[2].headers["retry-after"].isdigit()
    assert answers[2].code == "rate_limit_exceeded"
    assert answers[2].body["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (0.0125, "13ms"), (1, "1s"), (59.2, "1m0s"), (90, "1m30s"), (-1, "0s")]
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.usefixtures("no_minute_ends")
async def test_reading_is_not_limited_and_local_has_no_limits(tmp_path: Path) -> None:
    kit = DoorKit(tmp_path, LimitsConfig(inference_per_minute=1))
    assert {(await kit.ask("/v1/models", method="GET")).status for _ in range(5)} == {200}
    free = DoorKit(tmp_path)
    answers = [await free.ask() for _ in range(100)]
    assert {answer.status for answer in answers} == {200}
    assert not [name for name in answers[0].headers if name.startswith("x-ratelimit")]


@pytest.mark.usefixtures("no_minute_ends")
async def test_a_key_has_limits_of_its_own(tmp_path: Path) -> None:
    kit = DoorKit(tmp_path, LimitsConfig(inference_per_minute=2, concurrent_requests=1))
    less, none = kit.key("less", requests_per_minute=1), kit.key("none", requests_per_minute=0)
    for key, number in ((less, 1), ("", 2), (none, 9), (kit.key("same"), 2)):
        outcomes = [(await kit.ask(key=key)).status for _ in range(9)]
        assert outcomes == [200] * number + [429] * (9 - number)


@pytest.mark.usefixtures("no_minute_ends")
async def test_who_was_refused_by_a_limit_or_for_a_model_is_written_down_by_key(tmp_path: Path) -> None:
    kit = DoorKit(tmp_path, LimitsConfig(inference_per_minute=1, admin_per_minute=1))
    hasty, few = kit.key("hasty"), kit.key("few", models=("a",), requests_per_minute=0)
    with logged() as lines:
        for path, key in ((CHAT, hasty), (CHAT, hasty), ("/admin", ADMIN_KEY), ("/admin", ADMIN_KEY), (CHAT, few)):
            await kit.ask(path, key=key, body=b'{"model": "b"}')
    refused = [(line["status"], line["client"]) for line in lines if line["event"] == "http_request"]
    assert refused == [
        (200, "key:id-hasty"), (429, "key:id-hasty"), (200, "admin"), (429, "admin"), (403, "key:id-few"),
    ]  # fmt: skip


async def test_requests_of_one_client_run_together_up_to_its_limit_and_no_place_is_lost(tmp_path: Path) -> None:
    kit = DoorKit(tmp_path, LimitsConfig(concurrent_requests=2))
    go, running = asyncio.Event(), asyncio.Semaphore(0)

    async def work(_scope: object) -> None:
        running.release()
        await go.wait()
        raise LmxError("internal_error", "also these places come back")

    kit.work = work
    async with asyncio.TaskGroup() as tasks:
        two = [tasks.create_task(kit.ask()) for _ in range(2)]
        for _ in two:
            await running.acquire()
        assert (await kit.ask()).status == 429
        other = tasks.create_task(kit.ask(peer="192.0.2.8"))
        await running.acquire()
        go.set()
    assert [task.result().status for task in (*two, other)] == [500] * 3
    kit.work = None
    assert [(await kit.ask()).status for _ in range(5)] == [200] * 5


class TestTokens:
    @pytest.mark.usefixtures("no_minute_ends")
    async def test_they_are_reserved_before_the_work_and_settled_after_it(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path, LimitsConfig(tokens_per_minute=1000))

        async def work(scope: dict[str, object]) -> None:
            context_of(scope).tokens_used = 30

        kit.work = work  # type: ignore[assignment]
        body = b'{"max_tokens": 800}'
        left = [(await kit.ask(body=body)).headers["x-ratelimit-remaining-tokens"] for _ in range(3)]
        assert left == ["195", "165", "135"]

    @pytest.mark.usefixtures("no_minute_ends")
    async def test_what_was_not_settled_stays_counted_and_what_failed_is_given_back(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path, LimitsConfig(tokens_per_minute=1000))

        async def fail(_scope: object) -> None:
            raise LmxError("model_loading", "not yet")

        kit.work = fail
        assert [(await kit.ask(body=b'{"max_tokens": 800}')).status for _ in range(3)] == [503] * 3
        kit.work = None
        assert [(await kit.ask(body=b'{"max_tokens": 800}')).status for _ in range(2)] == [200, 429]

    async def test_more_than_was_reserved_is_owed(self, clock: Clock) -> None:
        each, headers = limiter(), []  # type: ignore[var-annotated]
        each.settle(await each.reserve("a", 1000, 100, headers), 950)
        with pytest.raises(LmxError):
            await each.reserve("a", 1000, 100, headers)
        assert (await each.reserve("b", 1000, 100, headers)).tokens == 100

    async def test_a_late_refund_does_not_make_room_in_another_minute(self, clock: Clock) -> None:
        each = limiter()
        early = await each.reserve("a", 1000, 900, [])
        clock.now += 200
        await each.reserve("a", 1000, 900, [])
        each.settle(early, 0)
        with pytest.raises(LmxError):
            await each.reserve("a", 1000, 200, [])

    async def test_a_request_that_can_never_be_granted_says_so(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path, LimitsConfig(tokens_per_minute=100))
        answer = await kit.ask(body=b'{"max_tokens": 5000}')
        assert (answer.status, answer.code) == (429, "rate_limit_exceeded")
        assert "5000 tokens" in answer.body["error"]["message"]
        assert (await kit.ask(body=b'{"messages": []}')).status == 200  # names none: as much as there is

    @pytest.mark.parametrize(
        ("body", "tokens"),
        [
            (b'{"max_tokens": 10}', 15),
            (b'{"max_tokens": 10, "max_completion_tokens": 20}', 32),
            (b'{"max_tokens": 10, "n": 3}', 37),
            (b'{"max_tokens": "10"}', 518),
            (b'{"max_tokens": -5, "n": true}', 520),
            (b"nonsense", 515),
            (b"", 513),
        ],
    )
    def test_the_estimate(self, body: bytes, tokens: int) -> None:
        assert estimate(wanted_of(body), len(body), "/chat/completions", 100_000) == tokens

    def test_embeddings_have_no_answer(self) -> None:
        assert estimate(wanted_of(b"{}"), 400, "/embeddings", 1000) == 101

    @settings(deadline=None)
    @given(st.binary(max_size=200), st.integers(1, 10_000))
    def test_every_body_has_an_estimate(self, body: bytes, limit: int) -> None:
        assert estimate(wanted_of(body), len(body), "/chat/completions", limit) >= 1


class TestBounds:
    async def test_the_table_of_windows_is_bounded_and_the_oldest_goes_first(self) -> None:
        storage = BoundedStorage(size=100)
        for number in range(1000):
            storage.add(f"k{number}", 1)
        assert list(storage.storage) == [f"k{number}" for number in range(900, 1000)]
        storage.take_back("k1", 5)
        storage.take_back("k999", 5)
        assert (len(storage.storage), storage.storage["k999"]) == (100, 0)
        for number in range(300):
            assert await storage.acquire_sliding_window_entry(f"c{number}", 5, 60)
        assert len(storage.storage) == 100
        assert len(storage.expirations) == 100
        assert not storage.locks
        assert not storage.events

    async def test_idle_clients_are_forgotten(self, clock: Clock) -> None:
        storage = BoundedStorage(size=100)
        for number in range(50):
            storage.add(f"k{number}", 1)
        clock.now += 121
        storage.add("new", 1)
        assert list(storage.storage) == list(storage.expirations) == ["new"]

    async def test_no_task_is_started_and_nothing_else_grows(self) -> None:
        each = limiter()
        before = len(asyncio.all_tasks())
        for number in range(3000):
            await each.inference(f"client-{number}", Budget(5, 0, 0), [])
        assert len(asyncio.all_tasks()) == before
        assert each.windows.storage.timer is None
        assert each._running == {}

    async def test_many_clients_make_a_request_no_slower(self) -> None:
        """The storage of the library looks at every window on each hit; ours at none."""
        each = limiter()

        def looks() -> float:
            best = math.inf
            for _ in range(5):
                began = asyncio.get_running_loop().time()
                for _ in range(20):
                    _run(each)
                best = min(best, asyncio.get_running_loop().time() - began)
            return best

        alone = looks()
        for number in range(15_000):
            await each.inference(f"client-{number}", Budget(5, 0, 0), [])
        assert looks() < 20 * alone

    async def test_running_requests_are_forgotten_when_they_end(self) -> None:
        each = limiter()
        for number in range(100):
            each.enter(f"client-{number}", 1)
        for number in range(100):
            each.leave(f"client-{number}")
        assert each._running == {}


def _run(each: Limiter) -> None:
    """Count one request to its end without giving the loop a turn: counting never waits."""
    with pytest.raises(StopIteration):
        each.inference("me", Budget(100_000, 0, 0), []).send(None)


@pytest.mark.usefixtures("no_minute_ends")
async def test_the_admin_key_and_keys_of_the_scope_admin_count_as_themselves(tmp_path: Path) -> None:
    kit = DoorKit(tmp_path, LimitsConfig(admin_per_minute=2))
    boss = kit.key("boss", scope="admin")
    for key in (ADMIN_KEY, boss):
        assert [(await kit.ask("/admin", key=key)).status for _ in range(3)] == [200, 200, 429]
    # Looking is free, and takes nothing of what orders have; guessing is not.
    looked = [(await kit.ask("/admin/status", key=ADMIN_KEY, method="GET")).status for _ in range(20)]
    assert looked == [200] * 20
    guessed = [(await kit.ask("/admin/status", key="guess", method="GET")).status for _ in range(4)]
    assert guessed == [403, 403, 429, 429]
    assert limiter().budget(Access("x")) == Budget(0, 0, 0)
    assert windows.MAX_WINDOWS == 20_000


@pytest.mark.parametrize(("profile", "imported"), [("local", False), ("lan", True)])
def test_a_gateway_that_limits_nobody_starts_without_the_package(profile: str, imported: bool) -> None:
    program = f"""
import sys
import gateway.service
from gateway.limits import Limiter
from protocol.config import LimitsConfig, SecurityConfig
from protocol.profiles import rules
Limiter(rules(SecurityConfig(profile={profile!r}), LimitsConfig()))
print("limits" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(imported)
