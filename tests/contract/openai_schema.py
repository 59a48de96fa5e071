"""Checks JSON against OpenAI's own description. `openai.json` is a cut of it (MIT)."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMAS: dict[str, Any] = json.loads(Path(__file__).with_name("openai.json").read_text())["components"]["schemas"]


def text_stream_schema() -> dict[str, Any]:
    """Return the schema of `/v1/completions` as it is in a stream and with `echo`.

    The description has one schema for all and forgets the nulls that OpenAI sends there: the reason before the end,
    usage before the last chunk, and the log probability of a token that nothing predicts.
    """
    schema: dict[str, Any] = copy.deepcopy(SCHEMAS["CreateCompletionResponse"])
    choice = schema["properties"]["choices"]["items"]["properties"]
    logprobs = choice["logprobs"]["anyOf"][0]["properties"]
    for holder, name in (
        (choice, "finish_reason"),
        (schema["properties"], "usage"),
        (logprobs["token_logprobs"], "items"),
        (logprobs["top_logprobs"], "items"),
    ):
        holder[name] = {"anyOf": [holder[name], {"type": "null"}]}
    return schema


SCHEMAS["CreateCompletionStreamResponse"] = text_stream_schema()
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
        yield from _faults_of_object(value, schema, at)
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield from faults(item, schema["items"], f"{at}[{index}]")


def _faults_of_object(value: dict[str, Any], schema: dict[str, Any], at: str) -> Iterator[str]:
    yield from (f"{at}.{name}: missing" for name in schema.get("required", ()) if name not in value)
    for name, inner in schema.get("properties", {}).items():
        if name in value:
            yield from faults(value[name], inner, f"{at}.{name}")
    if isinstance(schema.get("additionalProperties"), dict):
        for name in value.keys() - schema.get("properties", {}).keys():
            yield from faults(value[name], schema["additionalProperties"], f"{at}.{name}")


def check(value: Any, schema: str) -> None:
    assert list(faults(value, {"$ref": f"#/{schema}"})) == []
