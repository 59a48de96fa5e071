"""Grammars token by token, with MLX and llguidance."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import LmxError
from tests.modelkit import make_tiny_model

PAIR: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
WIDTH = 3_000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder: Path = make_tiny_model(tmp_path_factory.mktemp("model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Any:
    from worker.grammar import Grammars

    return Grammars(tokenizer, frozenset([tokenizer.eos_token_id]))


def allowed(constraint: Any, said: list[int], width: int = WIDTH) -> list[int]:
    import mlx.core as mx

    row = constraint(said, mx.zeros((1, width), dtype=mx.float16))
    assert row.shape == (1, width)
    assert row.dtype == mx.float16
    return [token for token, logit in enumerate(row[0].tolist()) if logit == 0]


def walk(constraint: Any, eos: int, seed: int, most: int = 400) -> Iterator[int]:
    """Yield random tokens that are allowed, until the end."""
    draw = random.Random(seed)
    said: list[int] = []
    while len(said) < most:
        token = draw.choice(allowed(constraint, said))
        if token == eos:
            return
        said.append(token)
        yield token


@pytest.mark.parametrize(
    "schema",
    [
        PAIR,
        {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 3},
        {"anyOf": [{"const": "é\n\"q\""}, {"type": "boolean"}, {"type": "null"}]},
        {"type": "object", "properties": {"p": {"type": "string", "pattern": "^[a-c]{1,4}$"}}, "required": ["p"]}
        | {"additionalProperties": False},
        {"type": "string", "format": "date"},
        {"type": "number", "minimum": -1, "maximum": 1.5},
    ],
)  # fmt: skip
def test_whatever_is_drawn_parses_when_it_ends(grammars: Any, tokenizer: Any, schema: dict[str, Any]) -> None:
    ended = 0
    for seed in range(6):
        constraint = grammars.for_schema(json.dumps(schema).encode(), None)
        tokens = list(walk(constraint, tokenizer.eos_token_id, seed))
        if len(tokens) < 400:
            ended += 1
            json.loads(tokenizer.decode(tokens))
        assert constraint.failed is None
    assert ended >= 5


def test_what_was_said_before_is_gone_through_first(grammars: Any, tokenizer: Any) -> None:
    schema = json.dumps(PAIR).encode()
    tokens = list(walk(grammars.for_schema(schema, None), tokenizer.eos_token_id, 3))
    step_by_step = grammars.for_schema(schema, None)
    for cut in range(len(tokens) + 1):
        wanted = allowed(step_by_step, tokens[:cut])
        assert allowed(grammars.for_schema(schema, None), tokens[:cut]) == wanted


def test_logits_wider_or_narrower_than_the_vocabulary(grammars: Any, tokenizer: Any) -> None:
    constraint = grammars.for_schema(json.dumps(PAIR).encode(), None)
    wide = allowed(constraint, [], 5_000)
    assert max(wide) < len(tokenizer)
    assert allowed(constraint, [], 500) == [token for token in wide if token < 500]


def test_tokens_behind_the_end_change_nothing(grammars: Any, tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    constraint = grammars.for_schema(b'{"const": 1}', None)
    said = tokenizer.encode("1", add_special_tokens=False)
    assert allowed(constraint, said) == [eos]
    assert allowed(constraint, [*said, eos]) == [eos]
    assert allowed(constraint, [*said, eos, 5]) == [eos]
    assert constraint.failed is None


def test_a_thought_may_come_before_and_cannot_end_the_answer(grammars: Any, tokenizer: Any) -> None:
    from worker.grammar import Thinking

    start, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    eos = tokenizer.eos_token_id
    schema = json.dumps(PAIR).encode()
    bare = allowed(grammars.for_schema(schema, None), [])
    free = [token for token in range(WIDTH) if token != eos]
    may = grammars.for_schema(schema, Thinking(start, (end,), is_open=False))
    assert allowed(may, []) == sorted([*bare, start])
    assert allowed(may, [start]) == free
    assert allowed(may, [start, 7]) == free
    assert allowed(may, [start, 7, end]) == bare
    must = grammars.for_schema(schema, Thinking(start, (end,), is_open=True))
    assert allowed(must, []) == free
    assert allowed(must, [7, end]) == bare
    straight = grammars.for_schema(schema, Thinking(start, (end,), is_open=False))
    assert start not in allowed(straight, bare[:1])


def test_white_space_is_bounded(grammars: Any, tokenizer: Any) -> None:
    constraint = grammars.for_schema(json.dumps(PAIR).encode(), None)
    said = tokenizer.encode("{", add_special_tokens=False)
    blank = tokenizer.encode("\n", add_special_tokens=False)
    for _ in range(8):
        assert blank[0] in allowed(constraint, said)
        said += blank
    assert blank[0] not in allowed(constraint, said)


def test_a_grammar_that_gets_too_complex_allows_only_the_end(
    grammars: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llguidance import LLParserLimits

    import worker.grammar

    monkeypatch.setattr(worker.grammar, "_limits", lambda: LLParserLimits(step_lexer_fuel=20, verbose_errors=False))
    monkeypatch.setattr(worker.grammar, "_TRIED_TOKENS", 0)
    constraint = grammars.for_schema(json.dumps(PAIR | {"title": "another"}).encode(), None)
    tokens = list(walk(constraint, tokenizer.eos_token_id, 1))
    assert len(tokens) < 20
    assert isinstance(constraint.failed, LmxError)
    assert constraint.failed.code == "invalid_value"
    assert allowed(constraint, tokens) == [tokenizer.eos_token_id]


def test_a_grammar_is_compiled_once_and_shared_by_nobody(
    grammars: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = json.dumps(PAIR | {"title": "shared"}).encode()
    first = grammars.for_schema(schema, None)
    monkeypatch.setattr(grammars, "_compile", None)
    second = grammars.for_schema(schema, None)
    beginning = allowed(second, [])
    said = tokenizer.encode('{"a', add_special_tokens=False)
    assert allowed(first, said) != beginning
    assert allowed(second, []) == beginning


def test_a_compilation_without_end_is_not_waited_for(grammars: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    import worker.grammar

    end = threading.Event()
    monkeypatch.setattr(worker.grammar, "COMPILE_S", 0.05)
    monkeypatch.setattr(grammars, "_try_out", lambda _: end.wait(30))
    for code in ("invalid_value", "invalid_value", "server_busy"):
        with pytest.raises(LmxError) as caught:
            grammars.for_schema(json.dumps({"title": f"{code} endless"}).encode(), None)
        assert caught.value.code == code
    end.set()
    monkeypatch.undo()
    assert allowed(grammars.for_schema(b'{"title": "after"}', None), [])


def test_forced_calls_name_a_tool_and_keep_references_of_each_schema(grammars: Any, tokenizer: Any) -> None:
    def tool(name: str, value: Any) -> dict[str, Any]:
        schema = {"$defs": {"v": {"const": value}}, "properties": {"v": {"$ref": "#/$defs/v"}}, "required": ["v"],
                  "additionalProperties": False}  # fmt: skip
        return {"type": "function", "function": {"name": name, "parameters": schema}}

    tools = [tool("one", 1), tool("two", 2), {"type": "function", "function": {"name": "bare"}}]
    seen = set()
    for seed in range(12):
        tokens = list(walk(grammars.for_call(tools[:2], None), tokenizer.eos_token_id, seed))
        call = json.loads(tokenizer.decode(tokens))
        assert call["arguments"] == {"v": {"one": 1, "two": 2}[call["name"]]}
        seen.add(call["name"])
    assert seen == {"one", "two"}
    head = tokenizer.encode('{"name": "bare", "arguments": ', add_special_tokens=False)
    begins = {tokenizer.decode([token])[0] for token in allowed(grammars.for_call(tools[2:], None), head)}
    assert begins == {"{"}
