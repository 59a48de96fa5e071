"""What a real gateway answers has the shape that OpenAI publishes; `tests/e2e/test_gateway_answers.py` checks more."""

import pytest

from protocol.data import Finish
from tests.contract.openai_schema import check, faults
from tests.e2e.gateway_harness import Stack, chunks, stack


def test_the_checker_finds_faults() -> None:
    good = {"id": "m", "object": "model", "created": 1, "owned_by": "lmx"}
    assert not any(faults(good, {"$ref": "#/Model"}))
    for bad in ({**good, "created": "1"}, {**good, "created": True}, {**good, "object": "thing"}, {"id": "m"}):
        assert any(faults(bad, {"$ref": "#/Model"}))
    with pytest.raises(AssertionError):
        check({"error": {"message": "x", "type": "t", "code": None}}, "ErrorResponse")


async def test_every_answer_has_openais_shape() -> None:
    async with stack() as lmx:
        await completions(lmx)
        await streams(lmx)
        for path in ("/v1/models", "/v1/models/tiny", "/v1/models/none", "/nowhere", "/v1/chat/completions"):
            answer = await lmx.client.get(path)
            schema = "ErrorResponse" if answer.is_error else "Model" if path.endswith("tiny") else "ListModelsResponse"
            check(answer.json(), schema)
        bad = await lmx.client.post("/v1/chat/completions", json={"model": "tiny", "messages": []})
        check(bad.json(), "ErrorResponse")


async def completions(lmx: Stack) -> None:
    worker = await lmx.start_worker()
    for finish in Finish:
        answering = lmx.chat()
        await worker.answer("some", " text", finish=finish)
        check((await answering).json(), "CreateChatCompletionResponse")


async def streams(lmx: Stack) -> None:
    worker = await lmx.start_worker("tiny", 2)
    for options in ({}, {"stream_options": {"include_usage": True}}):
        answering = lmx.chat(stream=True, **options)
        await worker.answer("some", " text", finish=Finish.LENGTH)
        *bodies, done = chunks((await answering).text)
        assert done == "[DONE]"
        for body in bodies:
            check(body, "CreateChatCompletionStreamResponse")
        assert len({(body["id"], body["created"], body["model"]) for body in bodies}) == 1
