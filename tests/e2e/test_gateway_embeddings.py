"""`/v1/embeddings` and `/v1/rerank` through a real gateway, before a worker that the test plays."""

import asyncio
import base64
import struct
from typing import Any

import httpx
import openai
import pytest

from protocol.control import Capabilities
from protocol.data import Accepted, Embedded, Kind, Ranked, Refused, Submit
from protocol.states import ModelState
from tests.contract.openai_schema import check
from tests.e2e.gateway_harness import FakeWorker, Stack, chunks, error_code, stack

ENCODER = Capabilities(256, 1, ["embedding", "rerank"], 32, has_chat_template=False)
VECTORS = [[0.6, 0.8], [1.0, 0.0], [0.0, -1.0]]


def packed(vector: list[float]) -> bytes:
    return struct.pack(f"<{len(vector)}f", *vector)


async def start_encoder(lmx: Stack, incarnation: int = 1) -> FakeWorker:
    worker = FakeWorker(lmx.home, "mini", incarnation)
    lmx.workers.append(worker)
    lmx.supervisor.publish(worker.catalog_model(capabilities=ENCODER))
    await lmx.state("mini", ModelState.READY)
    return worker


async def embed(worker: FakeWorker, vectors: list[list[float]]) -> Submit:
    """Take the next request and answer it."""
    submit = await worker.receive(Submit)
    await worker.send(Accepted(worker.incarnation, submit.rid, 9))
    await worker.send(Embedded(worker.incarnation, submit.rid, [packed(vector) for vector in vectors], 9))
    return submit


def post(lmx: Stack, path: str = "/v1/embeddings", **body: Any) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(lmx.client.post(path, json={"model": "mini", **body}))


async def test_vectors_have_openais_shape_and_the_worker_gets_the_inputs() -> None:
    async with stack() as lmx:
        worker = await start_encoder(lmx)
        for given, wanted in (
            ("hello", ["hello"]),
            (["a", "b", "c"], ["a", "b", "c"]),
            ([5, 6], [[5, 6]]),
            ([[5, 6], [7]], [[5, 6], [7]]),
        ):
            asking = post(lmx, input=given, user="me")
            submit = await embed(worker, VECTORS[: len(wanted)])
            answer = await asking
            assert (submit.kind, submit.inputs, submit.dimensions) == (Kind.EMBED, wanted, 0)
            assert 100 < submit.deadline_s <= 120
            body = answer.json()
            check(body, "CreateEmbeddingResponse")
            assert "x-lmx-ignored" not in answer.headers
            assert body["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
            assert [item["index"] for item in body["data"]] == list(range(len(wanted)))
            for item, vector in zip(body["data"], VECTORS, strict=False):
                assert struct.pack("<2f", *item["embedding"]) == packed(vector)


async def test_base64_is_the_same_numbers() -> None:
    async with stack() as lmx:
        worker = await start_encoder(lmx)
        asking = post(lmx, input=["a", "b"], encoding_format="base64", dimensions=2)
        assert (await embed(worker, VECTORS[:2])).dimensions == 2
        data = (await asking).json()["data"]
        assert [base64.b64decode(item["embedding"]) for item in data] == [packed(vector) for vector in VECTORS[:2]]


async def test_the_official_client() -> None:
    async with stack() as lmx:
        worker = await start_encoder(lmx)
        async with openai.AsyncOpenAI(base_url=f"{lmx.gateway.url}/v1", api_key="unused", max_retries=0) as client:
            for options in ({}, {"encoding_format": "float"}):
                asking = asyncio.create_task(client.embeddings.create(model="mini", input=["a", "b"], **options))
                await embed(worker, VECTORS[:2])
                answer = await asking
                got = [struct.pack("<2f", *item.embedding) for item in answer.data]
                assert got == [packed(vector) for vector in VECTORS[:2]]
                assert answer.usage.total_tokens == 9


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({}, "missing_field", "input"),
        ({"input": ""}, "invalid_value", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": [""]}, "invalid_value", "input[0]"),
        ({"input": ["a", []]}, "invalid_value", "input[1]"),
        ({"input": [1, "a"]}, "invalid_type", "input"),
        ({"input": [1, [1]]}, "invalid_type", "input"),
        ({"input": {"text": "a"}}, "invalid_type", "input"),
        ({"input": [-1]}, "invalid_value", "input"),
        ({"input": [2**80]}, "invalid_value", "input"),
        ({"input": [1.5]}, "invalid_type", "input[0]"),
        ({"input": ["a"] * 2049}, "invalid_value", "input"),
        ({"input": "a", "dimensions": 0}, "invalid_value", "dimensions"),
        ({"input": "a", "dimensions": 2**40}, "invalid_value", "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "invalid_value", "encoding_format"),
        ({"input": "a", "model": ""}, "invalid_value", "model"),
    ],
)
async def test_what_is_wrong_with_a_request_is_named(fields: dict[str, Any], code: str, param: str) -> None:
    async with stack() as lmx:
        await start_encoder(lmx)
        answer = await post(lmx, **fields)
        check(answer.json(), "ErrorResponse")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, code, param)


async def test_a_model_is_not_asked_for_what_it_does_not_do() -> None:
    async with stack() as lmx:
        await start_encoder(lmx)
        await lmx.start_worker("tiny")
        wrong = {
            "/v1/chat/completions": {"model": "mini", "messages": [{"role": "user", "content": "hi"}]},
            "/v1/completions": {"model": "mini", "prompt": "hi"},
            "/v1/embeddings": {"model": "tiny", "input": "hi"},
            "/v1/rerank": {"model": "tiny", "query": "hi", "documents": ["a"]},
        }
        for path, body in wrong.items():
            answer = await lmx.client.post(path, json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_value", "model")
            assert path in error["message"]
            assert ("/v1/chat/completions" if body["model"] == "tiny" else "/v1/embeddings") in error["message"]


async def test_the_workers_refusal_reaches_the_client() -> None:
    async with stack() as lmx:
        worker = await start_encoder(lmx)
        asking = post(lmx, input="long")
        submit = await worker.receive(Submit)
        await worker.send(Refused(1, submit.rid, "context_length_exceeded", "300 of 256", "input[0]"))
        answer = await asking
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[0]")


async def test_a_request_outlives_its_process_once_and_is_asked_anew() -> None:
    async with stack() as lmx:
        worker = await start_encoder(lmx)
        asking = post(lmx, input=["a"])
        submit = await worker.receive(Submit)
        await worker.send(Accepted(1, submit.rid, 9))
        worker.die()
        again = await start_encoder(lmx, 2)
        assert (await embed(again, VECTORS[:1])).inputs == ["a"]
        assert (await asking).status_code == 200


async def test_answers_that_do_not_fit_the_question_are_no_answers() -> None:
    async with stack() as lmx:
        worker = await start_encoder(lmx)
        asking = post(lmx, input=["a", "b"])
        await embed(worker, VECTORS[:1])
        assert error_code(await asking) == "protocol_error"


async def test_a_large_answer_does_not_stop_the_streams_of_others() -> None:
    async with stack() as lmx:
        encoder, chatting = await start_encoder(lmx), await lmx.start_worker("tiny")
        streaming = lmx.chat(stream=True)
        submit = await chatting.accept()
        asking = post(lmx, input=["a"] * 2048)
        await embed(encoder, [[0.0625] * 384] * 2048)
        await chatting.step(submit.rid, "on time")
        await chatting.step(submit.rid, "", finish=1)  # type: ignore[arg-type]
        assert chunks((await streaming).text)[-1] == "[DONE]"
        answer = await asking
        assert len(answer.json()["data"]) == 2048


async def test_a_ranking_is_sorted_cut_and_quotes_what_was_asked() -> None:
    async with stack() as lmx:
        worker = await start_encoder(lmx)
        for path in ("/v1/rerank", "/rerank"):
            documents: list[Any] = ["first", {"text": "second"}, "third", "fourth"]
            asking = post(lmx, path, query="q", documents=documents, top_n=3, return_documents=True)
            submit = await worker.receive(Submit)
            assert (submit.kind, submit.inputs) == (Kind.RERANK, ["q", "first", "second", "third", "fourth"])
            await worker.send(Ranked(1, submit.rid, [0.25, 0.75, 0.25, -0.5], 11))
            body = (await asking).json()
            assert body["results"] == [
                {"index": 1, "relevance_score": 0.75, "document": {"text": "second"}},
                {"index": 0, "relevance_score": 0.25, "document": {"text": "first"}},
                {"index": 2, "relevance_score": 0.25, "document": {"text": "third"}},
            ]
            assert body["usage"] == {"prompt_tokens": 11, "total_tokens": 11}
            assert (body["model"], body["object"]) == ("mini", "list")


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"documents": ["a"]}, "missing_field", "query"),
        ({"query": "q"}, "missing_field", "documents"),
        ({"query": "q", "documents": []}, "invalid_value", "documents"),
        ({"query": "", "documents": ["a"]}, "invalid_value", "query"),
        ({"query": "q", "documents": ["a", ""]}, "invalid_value", "documents[1]"),
        ({"query": "q", "documents": ["a", {"title": "b"}]}, "missing_field", "documents[1].text"),
        ({"query": "q", "documents": ["a"], "top_n": 0}, "invalid_value", "top_n"),
        ({"query": "q", "documents": ["a"], "max_chunks_per_doc": 3}, "unsupported_parameter", "max_chunks_per_doc"),
    ],
)
async def test_what_is_wrong_with_a_ranking_is_named(fields: dict[str, Any], code: str, param: str) -> None:
    async with stack() as lmx:
        await start_encoder(lmx)
        answer = await post(lmx, "/v1/rerank", **fields)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, code, param)
