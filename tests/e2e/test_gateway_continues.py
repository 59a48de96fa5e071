"""Requests outlive the process that works on them: what the gateway asks of the next one, and what its clients see."""

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest

from gateway.probation import PAST_TOKENS
from protocol.config import GatewayConfig, LifecycleConfig
from protocol.control import Drain, Drained, Stop
from protocol.data import Accepted, Delta, Failed, Finish, Refused, Resume, Step, Submit, Usage
from protocol.states import ModelState
from tests.chaos.test_rows_gateway import patched
from tests.e2e.gateway_harness import (
    FAIL,
    PATIENCE_S,
    FakeWorker,
    Stack,
    chat_body,
    chunks,
    error_code,
    stack,
    text_of,
    until,
)

SOON = GatewayConfig(keepalive_s=0.05)


async def say(worker: FakeWorker, rid: int, *words: str, first: int = 0) -> None:
    """Stream words; the tokens are their numbers."""
    for number, word in enumerate(words, first):
        await worker.send(Step(worker.incarnation, number, [Delta(rid, word, [number])]))


async def end(worker: FakeWorker, rid: int, tokens: int, text: str = "", finish: Finish = Finish.STOP) -> None:
    delta = Delta(rid, text, [99], finish, Usage(7, tokens, 3))
    await worker.send(Step(worker.incarnation, 99, [delta]))


class Reader:
    """Reads a stream as it comes."""

    def __init__(self, lmx: Stack, headers: dict[str, str] | None = None, **fields: Any) -> None:
        self.seen = ""
        self.status = 0
        self._news = asyncio.Event()
        self._body = chat_body(stream=True, **fields)
        self._headers = headers or {}
        self.task = asyncio.create_task(self._run(lmx.client))

    async def _run(self, client: httpx.AsyncClient) -> str:
        async with client.stream("POST", "/v1/chat/completions", json=self._body, headers=self._headers) as answer:
            self.status = answer.status_code
            self._news.set()
            async for text in answer.aiter_text():
                self.seen += text
                self._news.set()
        return self.seen

    async def until(self, what: str, times: int = 1) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.seen.count(what) < times:
                self._news.clear()
                assert not self.task.done(), self.seen
                await self._news.wait()

    async def until_text(self, text: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while text_of(self.seen) != text:
                self._news.clear()
                await self._news.wait()


def names(lmx: Stack) -> list[str]:
    return [entry["event"] for entry in lmx.gateway.events()]


async def test_a_stream_goes_on_in_the_next_process_where_it_stopped() -> None:
    async with stack(SOON) as lmx:
        first = await lmx.start_worker()
        reader = Reader(lmx, stream_options={"include_usage": True}, max_tokens=9)
        rid = (await first.accept()).rid
        await say(first, rid, "one ", "two ")
        await reader.until_text("one two ")
        first.die()
        lmx.supervisor.publish(first.catalog_model(state=ModelState.BACKOFF, incarnation=0, endpoint=""))
        await reader.until(": keepalive\n\n", 2)
        second = await lmx.start_worker("tiny", 2)
        again = await second.accept()
        assert (again.rid, again.resume, again.incarnation) == (rid, Resume([0, 1]), 2)
        assert again.sampling.max_tokens == 9
        await say(second, rid, "three ", first=2)
        await end(second, rid, 4, "four", Finish.LENGTH)
        body = await reader.task
        parts = chunks(body)
        assert (text_of(body), parts[-1]) == ("one two three four", "[DONE]")
        assert len({(part["id"], part["created"]) for part in parts[:-1]}) == 1
        assert sum("role" in part["choices"][0]["delta"] for part in parts[:-2]) == 1
        assert parts[-3]["choices"][0]["finish_reason"] == "length"
        assert parts[-2]["usage"]["completion_tokens"] == 4
        assert parts[-2]["usage"]["prompt_tokens"] == 7
        assert "event:" not in body
        assert {"requests_interrupted", "request_continued"} <= set(names(lmx))
        assert "one two" not in lmx.gateway.log.read_text()


async def test_a_whole_answer_is_continued_too() -> None:
    async with stack() as lmx:
        first = await lmx.start_worker()
        whole = lmx.chat()
        rid = (await first.accept()).rid
        await say(first, rid, "some ", "text ")
        other = Reader(lmx, seed=1)
        other_rid = (await first.accept()).rid
        await say(first, other_rid, "other ")
        await other.until_text("other ")  # a link keeps its order: what was said before is there too
        first.die()
        second = await lmx.start_worker("tiny", 2)
        again = await second.accept()  # the one with fewer tokens is tried first
        assert (again.rid, again.resume) == (other_rid, Resume([0]))
        await end(second, other_rid, 2, "end")
        again = await second.accept()
        assert (again.rid, again.resume) == (rid, Resume([0, 1]))
        await end(second, rid, 3, "and the end")
        answer = (await whole).json()
        assert answer["choices"][0]["message"]["content"] == "some text and the end"
        assert answer["usage"]["completion_tokens"] == 3
        assert text_of(await other.task) == "other end"


async def test_a_second_crash_ends_it_typed_and_a_third_process_refuses_it() -> None:
    async with stack(GatewayConfig(quarantine_after=3)) as lmx:
        for incarnation in (1, 2):
            worker = await lmx.start_worker("tiny", incarnation)
            if incarnation == 1:
                reader = Reader(lmx)
            rid = (await worker.accept()).rid
            await say(worker, rid, "word ", first=incarnation - 1)
            await reader.until_text("word " * incarnation)  # what is still on its way when it dies is lost
            worker.die()
        body = await reader.task
        assert chunks(body)[-1]["error"]["code"] == "worker_crashed"
        assert ("[DONE]" in body, body.count("event: error\n")) == (False, 1)

        third = await lmx.start_worker("tiny", 3)
        answering = lmx.chat(stream=True)  # the same request
        await third.accept()
        third.die()
        assert error_code(await answering) == "request_quarantined"
        fourth = await lmx.start_worker("tiny", 4)
        refused = await lmx.chat()
        assert (refused.status_code, error_code(refused)) == (422, "request_quarantined")
        assert "retry-after" not in refused.headers
        other = lmx.chat(seed=1)
        await fourth.answer("fine")
        assert (await other).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_what_no_process_has_accepted_is_resubmitted(stream: bool) -> None:
    async with stack(SOON) as lmx:
        # Other requests hold all slots of these workers, so nobody can think that this one was looked at.
        for incarnation in range(1, 5):
            worker = FakeWorker(lmx.home, "tiny", incarnation)
            lmx.workers.append(worker)
            capabilities = worker.catalog_model().capabilities
            assert capabilities is not None
            full = msgspec.structs.replace(capabilities, max_concurrent_requests=0)
            lmx.supervisor.publish(worker.catalog_model(capabilities=full))
            if incarnation == 1:
                await lmx.state("tiny", ModelState.READY)
                asking = lmx.chat(stream=stream)
            submit = await worker.receive(Submit)
            assert submit.resume is None
            if incarnation < 4:
                worker.die()
        await worker.send(Accepted(4, submit.rid, 7))
        await end(worker, submit.rid, 1, "there")
        answer = await asking
        assert answer.status_code == 200
        assert "there" in answer.text


async def test_a_process_that_dies_over_what_it_was_about_to_accept_names_it() -> None:
    """A prompt that ends the tokenizer is never accepted, and must not be tried for ever."""
    async with stack() as lmx:
        for incarnation in (1, 2):
            worker = await lmx.start_worker("tiny", incarnation)
            if incarnation == 1:
                asking = lmx.chat()
            await worker.receive(Submit)
            worker.die()
        answer = await asking
        assert (answer.status_code, error_code(answer)) == (422, "request_quarantined")


async def test_one_poison_among_seven_is_found_in_two_crashes() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        readers = {seed: Reader(lmx, seed=seed) for seed in range(8)}
        rids = {}
        for _ in readers:
            submit = await worker.accept()
            rids[submit.rid] = submit.sampling.seed
            await say(worker, submit.rid, *("w " * submit.sampling.seed).split(" ")[:-1])  # type: ignore[operator]
        for seed, reader in readers.items():
            await reader.until_text("w" * seed)
        worker.die()
        await until(lambda: "requests_interrupted" in names(lmx))
        newcomer = lmx.chat(seed=50)

        crashes, seen, current = 1, set(), await lmx.start_worker("tiny", 2)
        while True:
            submit = await current.accept()
            seed = submit.sampling.seed
            assert seed is not None
            tokens = 0 if submit.resume is None else len(submit.resume.token_ids)
            assert tokens >= seed % 50
            if seed == 5 and submit.rid not in seen:
                seen.add(submit.rid)
                late = lmx.chat(seed=60)
                current.die()
                crashes += 1
                assert crashes == 2
                current = await lmx.start_worker("tiny", 3)
                continue
            assert seed != 5, "it was tried again"
            if seed == 50:
                break
            await say(current, submit.rid, *("x" * PAST_TOKENS), first=tokens)
        # Newcomers come only now. Everyone else is on the third process, or was given to it again.
        await end(current, submit.rid, 1, "new")
        open_rids = {rid for rid, seed in rids.items() if seed not in {5, 50}}
        poison = await readers[5].task
        assert chunks(poison)[-1]["error"]["code"] == "request_quarantined"
        assert "new" in (await newcomer).text
        await end(current, (await current.accept()).rid, 1, "late")
        assert "late" in (await late).text
        for rid in open_rids:
            await end(current, rid, 9, "end")
        for seed, reader in readers.items():
            if seed != 5:
                body = await reader.task
                assert text_of(body).startswith("w" * seed + "x")
                assert text_of(body).endswith("end")
                assert chunks(body)[-1] == "[DONE]"
        refused = await lmx.chat(seed=5, stream=True)
        assert (refused.status_code, error_code(refused)) == (422, "request_quarantined")
        quarantined = [e for e in lmx.gateway.events() if e["event"] == "request_quarantined"]
        assert [len(e["digest"]) for e in quarantined] == [8]


@pytest.mark.parametrize("by_header", [False, True])
async def test_whoever_wants_to_fail_fails_at_once(by_header: bool) -> None:
    config = GatewayConfig() if by_header else GatewayConfig(on_crash="fail")
    headers = {"X-LMX-On-Crash": "fail"} if by_header else {}
    async with stack(config) as lmx:
        worker = await lmx.start_worker()
        reader = Reader(lmx, headers)
        await say(worker, (await worker.accept()).rid, "some")
        await reader.until_text("some")
        whole = asyncio.create_task(lmx.client.post("/v1/chat/completions", json=chat_body(seed=1), headers=headers))
        await worker.accept()
        died = time.monotonic()
        worker.die()
        assert chunks(await reader.task)[-1]["error"]["code"] == "worker_crashed"
        answer = await whole
        # 250 ms on an idle machine, whatever a busy one makes of it: not what others wait for the next process.
        assert time.monotonic() - died < config.hold_while_restarting_s / 3
        assert (answer.status_code, error_code(answer)) == (503, "worker_crashed")
        assert answer.headers["retry-after"] == "2"


async def test_the_header_overrides_the_configuration_both_ways_and_is_checked() -> None:
    async with stack(GatewayConfig(on_crash="fail")) as lmx:
        worker = await lmx.start_worker()
        reader = Reader(lmx, {"X-LMX-On-Crash": "Continue"})
        await say(worker, (await worker.accept()).rid, "some")
        await reader.until_text("some")
        worker.die()
        second = await lmx.start_worker("tiny", 2)
        await end(second, (await second.accept()).rid, 2, " more")
        assert text_of(await reader.task) == "some more"
        bad = await lmx.client.post(
            "/v1/chat/completions", json=chat_body(), headers={"X-LMX-On-Crash": "retry, please"}
        )
        error = bad.json()["error"]
        assert (bad.status_code, error["code"], error["param"]) == (400, "invalid_value", "X-LMX-On-Crash")


@pytest.mark.parametrize("word", ["failed", "refused"])
async def test_a_planned_replacement_is_nobodys_fault(word: str) -> None:
    """Again and again: the worker drains and gives back what it could not finish."""
    async with stack() as lmx:
        old = await lmx.start_worker()
        reader = Reader(lmx)
        submit = await old.accept() if word == "failed" else await old.receive(Submit)
        for incarnation in range(2, 6):
            if word == "failed":
                await say(old, submit.rid, f"{incarnation} ", first=incarnation - 2)
                await reader.until_text("".join(f"{number} " for number in range(2, incarnation + 1)))
                await old.send(Failed(old.incarnation, submit.rid, "model_restarting", "going", retryable=True))
            else:
                await old.send(Refused(old.incarnation, submit.rid, "model_restarting", "going", None, 2))
            new = await lmx.start_worker("tiny", incarnation)
            submit = await (new.accept() if word == "failed" else new.receive(Submit))
            old = new
        if word == "refused":
            await old.send(Accepted(old.incarnation, submit.rid, 7))
        assert submit.resume == (Resume([0, 1, 2, 3]) if word == "failed" else None)
        await end(old, submit.rid, 5, "end")
        assert text_of(await reader.task) == ("2 3 4 5 end" if word == "failed" else "end")
        assert "requests_interrupted" not in names(lmx)


@pytest.mark.parametrize("complete", [True, False])
async def test_how_a_process_ended_does_not_depend_on_who_tells_it_first(complete: bool) -> None:
    """On a busy machine the catalog with its successor may come before the news of its end and its last words."""
    async with stack() as lmx:
        first = await lmx.start_worker()
        whole = lmx.chat()
        rid = (await first.accept()).rid
        second = await lmx.start_worker("tiny", 2)  # which the gateway knows of now, and not of the first's end
        other = lmx.chat(seed=1)
        answered = await second.accept()
        if complete:
            await end(first, rid, 1, "all of it")
        else:
            first.die()
            assert (await second.accept()).rid == rid
            await end(second, rid, 1, "all of it")
        assert (await whole).json()["choices"][0]["message"]["content"] == "all of it"
        await end(second, answered.rid, 1, "other")
        assert (await other).json()["choices"][0]["message"]["content"] == "other"
        named = [entry["suspects"] for entry in lmx.gateway.events() if entry["event"] == "requests_interrupted"]
        assert named == ([] if complete else [1]), "who was in a crash is named"
        await until(lambda: "link_closed" in names(lmx))


async def test_a_replaced_process_that_says_nothing_more_is_given_up() -> None:
    async with stack() as lmx:
        first = await lmx.start_worker()
        whole = lmx.chat()
        rid = (await first.accept()).rid
        second = await lmx.start_worker("tiny", 2)
        assert (await second.accept()).rid == rid
        await end(second, rid, 1, "all of it")
        assert (await whole).json()["choices"][0]["message"]["content"] == "all of it"
        assert "requests_interrupted" not in names(lmx)


async def test_last_words_about_one_request_are_about_all() -> None:
    async with stack() as lmx:
        first = await lmx.start_worker()
        readers = [Reader(lmx, seed=seed) for seed in range(2)]
        rids = [(await first.accept()).rid for _ in readers]
        await first.send(Failed(1, rids[0], "worker_crashed", "bye", retryable=True))
        await until(lambda: "requests_interrupted" in names(lmx))
        second = await lmx.start_worker("tiny", 2)
        for _ in rids:
            await end(second, (await second.accept()).rid, 1, "fine")
        assert [text_of(await reader.task) for reader in readers] == ["fine", "fine"]
        (entry,) = [e for e in lmx.gateway.events() if e["event"] == "requests_interrupted"]
        assert (entry["requests"], entry["suspects"]) == (2, 2)


async def test_an_answer_that_has_begun_is_not_broken_off_for_want_of_room() -> None:
    """A model that comes back with less room, as after running out of memory."""
    async with stack(SOON) as lmx:
        first = await lmx.start_worker()
        reader = Reader(lmx)
        rid = (await first.accept()).rid
        await say(first, rid, "some ")
        await reader.until_text("some ")
        first.die()
        second = await lmx.start_worker("tiny", 2)
        for _ in range(2):
            await second.receive(Submit)
            await second.send(Refused(2, rid, "server_busy", "full", None, 5))
        assert (await second.accept()).resume == Resume([0])
        await end(second, rid, 2, "more")
        assert text_of(await reader.task) == "some more"
        fresh = lmx.chat()
        await second.send(Refused(2, (await second.receive(Submit)).rid, "server_busy", "full", None, 5))
        assert (await fresh).status_code == 429


# -- holding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [ModelState.STARTING, ModelState.LOADING, ModelState.WARMING, ModelState.BACKOFF])
async def test_requests_for_a_model_that_is_coming_up_are_held(state: ModelState) -> None:
    async with stack(SOON) as lmx:
        worker = FakeWorker(lmx.home, "tiny")
        lmx.workers.append(worker)
        lmx.supervisor.publish(worker.catalog_model(state=state, endpoint="", incarnation=0))
        await lmx.state("tiny", state)
        whole, reader = lmx.chat(), Reader(lmx)
        await reader.until(": keepalive\n\n", 2)
        assert (reader.status, text_of(reader.seen)) == (200, "")
        lmx.supervisor.publish(worker.catalog_model())
        for _ in range(2):
            await worker.answer("here")
        assert text_of(await reader.task) == "here"
        assert (await whole).json()["choices"][0]["message"]["content"] == "here"


async def test_a_held_request_waits_no_longer_than_it_may() -> None:
    async with stack(GatewayConfig(hold_while_loading_s=0.2, hold_while_restarting_s=0.1)) as lmx:
        worker = FakeWorker(lmx.home, "tiny")
        lmx.workers.append(worker)
        for state, code in ((ModelState.LOADING, "model_loading"), (ModelState.BACKOFF, "model_restarting")):
            lmx.supervisor.publish(worker.catalog_model(state=state, endpoint="", incarnation=0))
            await lmx.state("tiny", state)
            for answer in await asyncio.gather(lmx.chat(), lmx.chat(stream=True)):
                assert (answer.status_code, error_code(answer)) == (503, code)
                assert int(answer.headers["retry-after"]) >= 1
        # One that was interrupted is told why.
        lmx.supervisor.publish(worker.catalog_model())
        await lmx.state("tiny", ModelState.READY)
        reader = Reader(lmx)
        await say(worker, (await worker.accept()).rid, "some")
        await reader.until_text("some")
        worker.die()
        assert chunks(await reader.task)[-1]["error"]["code"] == "worker_crashed"


async def test_its_own_deadline_ends_a_held_request() -> None:
    async with stack(GatewayConfig(chat_timeout_s=0.2)) as lmx:
        worker = FakeWorker(lmx.home, "tiny")
        lmx.workers.append(worker)
        lmx.supervisor.publish(worker.catalog_model(state=ModelState.LOADING, endpoint="", incarnation=0))
        await lmx.state("tiny", ModelState.LOADING)
        answer = await lmx.chat()
        assert (answer.status_code, error_code(answer)) == (504, "timeout")


@pytest.mark.parametrize(
    ("change", "code", "status"),
    [
        ({"state": ModelState.QUARANTINED, "error_code": "model_quarantined"}, "model_quarantined", 503),
        ({"state": ModelState.STOPPED}, "model_not_found", 404),
        ({"state": ModelState.STOPPING, "error_code": "model_not_found"}, "model_not_found", 404),
    ],
)
async def test_a_model_that_will_not_come_ends_what_waits_for_it(
    change: dict[str, Any], code: str, status: int
) -> None:
    async with stack(SOON) as lmx:
        worker = await lmx.start_worker()
        streaming = Reader(lmx)
        await say(worker, (await worker.accept()).rid, "some")
        await streaming.until_text("some")
        worker.die()
        gone: dict[str, Any] = {"endpoint": "", "incarnation": 0}
        lmx.supervisor.publish(worker.catalog_model(state=ModelState.BACKOFF, **gone))
        await lmx.state("tiny", ModelState.BACKOFF)
        held, commented = lmx.chat(), Reader(lmx, seed=1)
        await commented.until(": keepalive\n\n")
        lmx.supervisor.publish(worker.catalog_model(**gone, **change))
        for reader in (streaming, commented):
            assert chunks(await reader.task)[-1]["error"]["code"] == code
        answer = await held
        assert (answer.status_code, error_code(answer)) == (status, code)


async def test_only_so_many_are_held() -> None:
    async with stack(GatewayConfig(max_held=3, keepalive_s=0.05)) as lmx:
        worker = FakeWorker(lmx.home, "tiny")
        lmx.workers.append(worker)
        lmx.supervisor.publish(worker.catalog_model(state=ModelState.LOADING, endpoint="", incarnation=0))
        await lmx.state("tiny", ModelState.LOADING)
        held = [Reader(lmx) for _ in range(3)]
        for reader in held:
            await reader.until(": keepalive\n\n")
        refused = await lmx.chat()
        assert (refused.status_code, error_code(refused)) == (429, "server_busy")
        # One that leaves makes room, and costs the worker nothing.
        held[0].task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await held[0].task
        await until(lambda: "inference_cancelled" in names(lmx))
        third = Reader(lmx, seed=3)
        await third.until(": keepalive\n\n")
        lmx.supervisor.publish(worker.catalog_model())
        submits = [await worker.answer("x") for _ in range(3)]
        assert [submit.sampling.seed for submit in submits] == [None, None, 3]
        for reader in (*held[1:], third):
            assert text_of(await reader.task) == "x"


async def test_a_client_that_leaves_between_two_processes_is_not_continued() -> None:
    async with stack() as lmx:
        first = await lmx.start_worker()
        reader = Reader(lmx)
        await say(first, (await first.accept()).rid, "some")
        await reader.until_text("some")
        first.die()
        await until(lambda: "requests_interrupted" in names(lmx))
        reader.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reader.task
        await until(lambda: "inference_cancelled" in names(lmx))
        second = await lmx.start_worker("tiny", 2)
        asking = lmx.chat(seed=9)
        assert (await second.answer("next")).sampling.seed == 9
        assert (await asking).status_code == 200


async def test_sixty_continued_crashes_leak_nothing() -> None:
    async with stack() as lmx:
        reader: Reader | None = None
        for incarnation in range(1, 31):
            worker = await lmx.start_worker("tiny", incarnation)
            if reader is not None:
                await end(worker, (await worker.accept()).rid, 2, "b")
                assert text_of(await reader.task) == "ab"
            reader = Reader(lmx, seed=incarnation)
            await say(worker, (await worker.accept()).rid, "a")
            await reader.until_text("a")
            worker.die()
            lmx.workers.clear()
        assert await lmx.start_worker("tiny", 99)
        assert "request_quarantined" not in names(lmx)


# -- clients, shutdown, hand-over -----------------------------------------------------------------------------------


async def test_openai_sees_one_seamless_stream() -> None:
    async with stack(SOON) as lmx:
        client = openai.AsyncOpenAI(base_url=f"{lmx.gateway.url}/v1", api_key="unused", max_retries=0)
        first = await lmx.start_worker()
        async with client:
            accepting = asyncio.create_task(first.accept())
            stream = await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "hello"}], stream=True
            )
            rid, ids, text, finish = (await accepting).rid, set(), "", None
            await say(first, rid, "one ")
            going_on: asyncio.Task[None] | None = None

            async def go_on() -> None:
                first.die()
                await asyncio.sleep(0.12)  # for two comments: the silence is what is tested
                second = await lmx.start_worker("tiny", 2)
                await end(second, (await second.accept()).rid, 2, "two")

            async for chunk in stream:
                ids.add(chunk.id)
                text += chunk.choices[0].delta.content or ""
                finish = chunk.choices[0].finish_reason or finish
                if text == "one " and going_on is None:
                    going_on = asyncio.create_task(go_on())
            assert going_on is not None
            await going_on
            assert (text, finish, len(ids)) == ("one two", "stop", 1)


async def test_stopping_ends_what_is_held() -> None:
    async with stack(lifecycle=LifecycleConfig(drain_s=0.05)) as lmx:
        worker = await lmx.start_worker()
        reader = Reader(lmx)
        await say(worker, (await worker.accept()).rid, "some")
        await reader.until_text("some")
        worker.die()
        await until(lambda: "requests_interrupted" in names(lmx))
        lmx.gateway.process.terminate()
        assert chunks(await reader.task)[-1]["error"]["code"] == "shutting_down"
        assert await lmx.gateway.exit_code() == 0


async def test_a_hand_over_leaves_new_connections_to_the_next_gateway_and_finishes_the_open_ones() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        reader = Reader(lmx)
        rid = (await worker.accept()).rid
        await say(worker, rid, "some ")
        await reader.until_text("some ")
        keeping = httpx.Limits(max_keepalive_connections=1)
        url = lmx.gateway.url
        async with httpx.AsyncClient(base_url=url, trust_env=False, limits=keeping, timeout=PATIENCE_S) as kept:
            assert (await kept.get("/healthz")).status_code == 200
            lmx.supervisor.send(Drain(30, hand_over=True))
            await until(lambda: "gateway_handing_over" in names(lmx))
            again = await kept.get("/healthz")  # on the same connection
            assert (again.status_code, again.headers["connection"]) == (200, "close")
            # The kernel takes the next connection; this gateway does not.
            waiting = asyncio.create_task(kept.get("/healthz"))
            await end(worker, rid, 2, "more")
            assert text_of(await reader.task) == "some more"
            await lmx.supervisor.hear(Drained)
            assert not waiting.done()
            lmx.supervisor.send(Stop("replaced"))
            assert await lmx.gateway.exit_code() == 0
            lmx.gateway.spawn()
            assert (await waiting).status_code == 200


async def test_a_request_that_follows_on_a_kept_connection_is_served_though_nothing_ran_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A second is enough for a client, not for one whose machine takes its core away.
    patient = "from gateway import service; service._LET_GO_AFTER_S = 15.0"
    for name, value in patched(tmp_path / "site", gateway=patient).items():
        monkeypatch.setenv(name, value)
    async with stack(SOON) as lmx, httpx.AsyncClient(base_url=lmx.gateway.url, trust_env=False, timeout=20) as kept:
        worker = await lmx.start_worker()
        # A keep-alive comment sends the head of the answer before the hand-over: the connection stays open after it.
        heads: list[httpx.Response] = []

        async def ask() -> str:
            async with kept.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as answer:
                heads.append(answer)
                await answer.aread()
                return text_of(answer.text)

        async def stop_when_drained() -> None:
            await lmx.supervisor.hear(Drained)
            lmx.supervisor.send(Stop("replaced"))

        first = asyncio.create_task(ask())
        rid = (await worker.accept()).rid
        await until(lambda: len(heads) == 1)
        stopping = asyncio.create_task(stop_when_drained())
        lmx.supervisor.send(Drain(30, hand_over=True))
        await until(lambda: "gateway_handing_over" in names(lmx))
        await end(worker, rid, 1, "one")
        assert await first == "one"
        await asyncio.sleep(0.2)  # the client thinks
        second = asyncio.create_task(ask())
        await end(worker, (await worker.accept()).rid, 1, "two")
        assert await second == "two"
        assert [head.headers.get("connection") for head in heads] == [None, "close"]
        await stopping
        assert await lmx.gateway.exit_code() == 0


async def test_holding_nothing_is_the_old_way() -> None:
    async with stack(FAIL) as lmx:
        worker = FakeWorker(lmx.home, "tiny")
        lmx.workers.append(worker)
        lmx.supervisor.publish(worker.catalog_model(state=ModelState.LOADING, endpoint="", incarnation=0))
        await lmx.state("tiny", ModelState.LOADING)
        answer = await lmx.chat()
        assert (answer.status_code, error_code(answer)) == (503, "model_loading")
