"""What a JSON schema may be."""

import json
from typing import Any

import pytest

from protocol.errors import LmxError
from worker.schema import check_schema


def refused(schema: Any) -> str:
    encoded = schema if isinstance(schema, bytes) else json.dumps(schema).encode()
    with pytest.raises(LmxError) as caught:
        check_schema(encoded, "response_format")
    assert (caught.value.code, caught.value.param) == ("invalid_value", "response_format")
    return caught.value.message


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def test_what_tools_generate_passes() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$defs": {"item": {"type": "object", "properties": {"id": {"type": "string", "pattern": "^[a-z]{3}$"}}}},
        "type": "object",
        "properties": {
            "items": {"type": "array", "items": {"$ref": "#/$defs/item"}},
            "kind": {"enum": ["a", "b", None, 3]},
            "price": {"type": "number", "multipleOf": 0.01},
            "deep": nested(12),
        },
        "required": ["items"],
        "additionalProperties": False,
    }
    assert check_schema(json.dumps(schema).encode(), "response_format") == schema
    assert check_schema(b"true", "response_format") == {}
    wide = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(400)}}
    assert check_schema(json.dumps(wide).encode(), "response_format") == wide


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (b'{"a":' * 60_000, "64 KiB"),
        (b'{"a":' * 10_000, "levels"),
        (b"[" * 60_000, "levels"),
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[]", "must be an object"),
        (b"false", "must be an object"),
        (nested(40), "levels of nesting"),
        ({"properties": {f"p{number}": {} for number in range(401)}}, "properties"),
        ({"anyOf": [{}] * 4_001}, "objects and lists"),
        ({"enum": list(range(2_001))}, "enum"),
        ({"const": "x" * 5_000}, "4,096"),
        ({"$ref": "https://example.com/schema.json"}, "another document"),
        ({"$ref": "file:///etc/passwd"}, "another document"),
        ({"$defs": {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(201)}}, "references"),
        ({"pattern": "a" * 257}, "256"),
        ({"anyOf": [{"pattern": str(number)} for number in range(65)]}, "patterns"),
        ({"allOf": [{"pattern": str(number)} for number in range(5)]}, "beside allOf"),
        ({"patternProperties": {str(number): {} for number in range(5)}}, "beside allOf"),
        ({"type": "integer", "multipleOf": 1_000_003}, "multipleOf"),
        ({"allOf": [{"multipleOf": 9_973}, {"multipleOf": 9_967}]}, "multipleOf"),
        ({"anyOf": [{"multipleOf": 9_973}, {"multipleOf": 9_967}]}, "multipleOf"),
    ],
)
def test_every_bound_is_named(schema: Any, words: str) -> None:
    assert words in refused(schema)
