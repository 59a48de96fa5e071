"""What every client program has in common: it tries its features one by one and prints a line of JSON for each.

Runs in the client's own environment, which has nothing of ours: standard library only.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable

URL = os.environ["LMX_TEST_URL"] + "/v1"
MODEL = os.environ["LMX_TEST_MODEL"]
EMBEDDER = os.environ["LMX_TEST_EMBEDDER"]
KEY = "not-needed"

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
#: Greedy, so that what is said twice can be compared.
GREEDY = {"temperature": 0, "max_tokens": 24}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}

_features: list[tuple[str, Callable[[], None]]] = []


def feature(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a function that raises unless the client can do `name`."""

    def add(function: Callable[[], None]) -> Callable[[], None]:
        _features.append((name, function))
        return function

    return add


def check_arguments(text: str) -> None:
    """Assert that a call of `WEATHER` has the arguments that its schema asks for."""
    arguments = json.loads(text)
    assert set(arguments) == {"city", "unit"}, arguments
    assert arguments["unit"] in {"C", "F"}, arguments


def check_person(text: str) -> None:
    """Assert that a text is a `PERSON`."""
    person = json.loads(text)
    assert set(person) == {"name", "age"}, person
    assert isinstance(person["name"], str), person
    assert 0 <= person["age"] <= 150, person


def run() -> None:
    """Try every feature; the exit code is 0 whatever they do, since the lines say it."""
    for name, function in _features:
        try:
            function()
        except Exception:  # whatever a client raises is the result
            line = {"feature": name, "ok": False, "detail": traceback.format_exc()[-1500:]}
        else:
            line = {"feature": name, "ok": True, "detail": ""}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
