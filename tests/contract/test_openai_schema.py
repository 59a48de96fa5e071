"""What a real gateway answers has the shape that OpenAI publishes. `openai.json` is a cut of its description (MIT)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.data import Finish
from tests.e2e.gateway_harness import Stack, chunks, stack

SCHEMAS: dict[str, Any] = json.loads(Path(__file__).with_name("openai.json").read_text())["components"]["schemas"]
TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def faults(value: Any, schema: dict[str, Any], at: str = "$") -> Iterator[str]:
    """Yield where `value` does not have the shape; knows every keyword of `openai.json`, `format` being a remark."""
    known = {
        "type",
        "properties",
        "required",
        "items",
        "enum",
        "anyOf",
        "oneOf",
        "additionalProperties",
        "format",
        "$ref",
    }
    assert schema.keys() <= known, schema.keys() - known
    if "$ref" in schema:
        yield from faults(value, SCHEMAS[schema["$ref"].rsplit("/", 1)[1]], at)
        return
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices and all(any(faults(value, choice, at)) for choice in choices):
        yield f"{at}: fits none of {len(choices)} choices"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at}: {value!r} is not one of {schema['enum']}"
    if "type" in schema:
        fits = isinstance(value, TYPES[schema["type"]]) and (schema["type"] == "boolean" or not isinstance(value, bool))
        if not fits:
            yield f"{at}: {value!r} is no {schema['type']}"
            return
    if isinstance(value, dict):
        yield from (f"{at}.{name}: missing" for name in schema.get("required", ()) if name not in value)
        for name, inner in schema.get("properties", {}).items():
            if name in value:
                yield from faults(value[name], inner, f"{at}.{name}")
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield from faults(item, schema["items"], f"{at}[{index}]")


def check(value: Any, schema: str) -> None:
    assert list(faults(value, {"$ref": f"#/{schema}"})) == []


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
