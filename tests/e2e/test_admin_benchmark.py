"""`/admin/benchmark` measures real requests, one benchmark at a time, for administrators."""

import asyncio
from typing import Any

import httpx

from protocol.config import LimitsConfig, SecurityConfig
from protocol.data import Failed, Finish
from protocol.keys import digest_of
from tests.e2e.gateway_harness import FAIL, Stack, stack

KEY = "an-admin-key-of-the-tests"
ADMIN = {"authorization": f"Bearer {KEY}"}
DIGEST = digest_of(KEY.encode()).hex()
PATH = "/admin/benchmark"


def measure(lmx: Stack, **fields: Any) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(lmx.client.post(PATH, json={"model": "tiny", **fields}, headers=ADMIN))


async def test_it_counts_what_came_and_asks_each_time_for_something_new() -> None:
    async with stack(FAIL, admin_digest=DIGEST) as lmx:
        worker = await lmx.start_worker()
        asked = measure(lmx, requests=3, streams=2, max_tokens=4)
        first, second = await worker.accept(), await worker.accept()
        busy = await measure(lmx)
        assert (busy.status_code, busy.json()["code"]) == (409, "conflict")
        await worker.step(first.rid, "a")
        await asyncio.sleep(0.05)  # what is measured is time
        await worker.send(Failed(worker.incarnation, second.rid, "internal_error", "no"))
        # It comes when the first's text and the second's end were seen; so the first one's end is later than anything.
        third = await worker.answer("a", "b", "c", finish=Finish.LENGTH)
        await worker.step(first.rid, "b", tokens=4, finish=Finish.LENGTH)
        found = (await asked).json()
        assert (found["schema"], found["completed"], found["failed"]) == ("lmx.benchmark/1", 2, {"internal_error": 1})
        assert (found["prompt_tokens"], found["completion_tokens"]) == (14, 7)
        assert 0.9 < found["tokens_per_s"] * found["duration_s"] / 7 < 1.1
        assert 0 < found["ttft_ms"]["p50"] <= found["ttft_ms"]["max"] < found["latency_ms"]["max"]
        assert found["latency_ms"]["max"] >= 50
        prompts = {submit.messages[0].content for submit in (first, second, third)}
        assert len(prompts) == 3
        assert {submit.sampling.max_tokens for submit in (first, second, third)} == {4}


async def test_who_hangs_up_ends_it() -> None:
    async with stack(FAIL, admin_digest=DIGEST) as lmx:
        worker = await lmx.start_worker()
        asked = measure(lmx)
        submit = await worker.accept()
        asked.cancel()
        await worker.aborted(submit.rid)
        again = measure(lmx, requests=1)
        await worker.answer("x")
        assert (await again).json()["completed"] == 1


async def test_it_is_an_order_with_bounds_and_words() -> None:
    security, limits = SecurityConfig(profile="lan"), LimitsConfig(admin_per_minute=5)
    async with stack(FAIL, admin_digest=DIGEST, security=security, limits=limits) as lmx:
        assert (await lmx.client.post(PATH, json={"model": "tiny"})).status_code == 401
        wrong = [await measure(lmx, **fields) for fields in ({"streams": 33}, {"requests": 0}, {"prompt": "x"})]
        assert {answer.status_code for answer in wrong} == {400}
        assert (await measure(lmx, model="none")).json()["code"] == "model_not_found"
        statuses = [(await measure(lmx, model="none")).status_code for _ in range(3)]
        assert statuses == [404, 429, 429]
