"""The official client, unchanged."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from protocol.config import GatewayConfig
from protocol.data import Finish, Refused, Submit
from tests.e2e.gateway_harness import FAIL, Stack, stack

HELLO: Any = [{"role": "user", "content": "hello"}]


@asynccontextmanager
async def client_of(lmx: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{lmx.gateway.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


async def test_whole_answers() -> None:
    async with stack() as lmx, client_of(lmx) as client:
        worker = await lmx.start_worker("org/tiny")
        asking = asyncio.create_task(client.chat.completions.create(model="org/tiny", messages=HELLO, max_tokens=5))
        await worker.answer("Hel", "lo", finish=Finish.LENGTH)
        answer = await asking
        assert answer.choices[0].message.content == "Hello"
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 2, 9)
        assert answer._request_id is not None


async def test_streams() -> None:
    async with stack() as lmx, client_of(lmx) as client:
        worker = await lmx.start_worker()
        answering = asyncio.create_task(worker.answer("Hel", "lo", "!"))
        stream = await client.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        got: list[ChatCompletionChunk] = [chunk async for chunk in stream]
        await answering
        assert got[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in got if c.choices) == "Hello!"
        assert got[-2].choices[0].finish_reason == "stop"
        assert got[-1].choices == []
        assert got[-1].usage is not None
        assert got[-1].usage.total_tokens == 10
        assert len({c.id for c in got}) == 1


async def test_the_streaming_helper() -> None:
    async with stack() as lmx, client_of(lmx) as client:
        worker = await lmx.start_worker()
        answering = asyncio.create_task(worker.answer("Hel", "lo"))
        async with client.chat.completions.stream(model="tiny", messages=HELLO) as stream:
            final = await stream.get_final_completion()
        await answering
        assert final.choices[0].message.content == "Hello"


async def test_comments_do_not_disturb_it() -> None:
    async with stack(GatewayConfig(keepalive_s=0.02)) as lmx, client_of(lmx) as client:
        worker = await lmx.start_worker()

        async def answer_late() -> None:
            submit = await worker.accept()
            await asyncio.sleep(0.2)  # the silence is what is tested
            await worker.step(submit.rid, "late", finish=Finish.STOP)

        answering = asyncio.create_task(answer_late())
        stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        texts = [chunk.choices[0].delta.content async for chunk in stream]
        await answering
        assert texts == ["", "late", None]


async def test_models() -> None:
    async with stack() as lmx, client_of(lmx) as client:
        await lmx.start_worker("org/tiny")
        assert [model.id async for model in client.models.list()] == ["org/tiny"]
        assert (await client.models.retrieve("org/tiny")).owned_by == "lmx"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("none")


async def test_errors_become_its_exceptions() -> None:
    async with stack(FAIL) as lmx, client_of(lmx) as client:
        worker = await lmx.start_worker()
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="none", messages=HELLO)
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        assert missing.value.request_id is not None
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model="tiny", messages=HELLO, temperature=3)
        assert (bad.value.code, bad.value.param, bad.value.type) == (
            "invalid_value",
            "temperature",
            "invalid_request_error",
        )
        asking = asyncio.create_task(client.chat.completions.create(model="tiny", messages=HELLO))
        submit = await worker.receive(Submit)
        await worker.send(Refused(1, submit.rid, "server_busy", "full"))
        with pytest.raises(openai.RateLimitError):
            await asking
        asking = asyncio.create_task(client.chat.completions.create(model="tiny", messages=HELLO))
        await worker.accept()
        worker.die()
        with pytest.raises(openai.InternalServerError) as crashed:
            await asking
        assert crashed.value.code == "worker_crashed"
        assert crashed.value.response.headers["retry-after"] == "2"


async def test_a_broken_stream_raises() -> None:
    async with stack(FAIL) as lmx, client_of(lmx) as client:
        worker = await lmx.start_worker()
        accepting = asyncio.create_task(worker.accept())
        stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        await worker.step((await accepting).rid, "some")
        got: list[str | None] = []

        async def read() -> None:
            async for chunk in stream:
                got.append(chunk.choices[0].delta.content)
                if got[-1] == "some":
                    worker.die()

        with pytest.raises(openai.APIError) as broken:
            await read()
        assert got == ["", "some"]
        assert broken.value.code == "worker_crashed"


async def test_it_retries_a_crashed_worker_by_itself() -> None:
    async with stack(FAIL) as lmx:
        worker = await lmx.start_worker()
        client = openai.AsyncOpenAI(base_url=f"{lmx.gateway.url}/v1", api_key="unused", max_retries=2)
        async with client:
            asking = asyncio.create_task(client.chat.completions.create(model="tiny", messages=HELLO))
            await worker.accept()
            worker.die()
            again = await lmx.start_worker("tiny", 2)
            await again.answer("second try")
            assert (await asking).choices[0].message.content == "second try"
