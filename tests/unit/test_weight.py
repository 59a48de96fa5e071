"""Bodies that would keep the interpreter busy for seconds are refused before anything is made of them."""

import json
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import weight
from gateway.decode import read
from gateway.inspection import estimate, wanted_of
from gateway.validate import parse_chat, parse_completion, parse_detokenize
from gateway.weight import MAX_CONTAINERS, MAX_STRINGS, MAX_VALUES, check_weight
from protocol.config import GatewayConfig
from protocol.errors import LmxError

HEAD = b'{"model": "tiny", "messages": [{"role": "user", "content": "x"'
MANY = MAX_CONTAINERS + 1


class Unused:
    """A decoder that must not be asked."""

    def decode(self, _body: bytes) -> NoReturn:
        raise AssertionError("the body was decoded")


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "tiny", "messages": [' + b"{}," * MANY + b"{}]}",
        HEAD + b', "annotations": [' + b"[]," * MANY + b"[]]}]}",
        HEAD + b'}], "tools": [' + b'{"type": "function"},' * MANY + b"{}]}",
        HEAD + b'}], "stop": [' + b'"",' * (MAX_STRINGS + 1) + b'""]}',
        HEAD + b"}]," + b'"x": 1,' * (MAX_STRINGS + 1) + b'"y": 1}',
        HEAD + b'}], "metadata": [' + b'"\\\\",' * (2 * MAX_STRINGS + 1) + b'""]}',
        b'{"model": "tiny", "prompt": [' + b"1," * (MAX_VALUES + 1) + b"1]}",
        b'{"model": "tiny", "prompt": [' + b"[1]," * MANY + b"[1]]}",
        b'{"a": "' + b"[" * MANY + b'", "b": [' + b"[]," * MANY,
    ],
    ids=["messages", "annotations", "tools", "stop", "fields", "escapes", "numbers", "lists", "text before"],
)
def test_more_values_than_any_request_needs_are_refused_undecoded(body: bytes) -> None:
    with pytest.raises(LmxError) as refused:
        read(body, Unused())  # type: ignore[arg-type]
    assert (refused.value.code, refused.value.spec.status) == ("invalid_value", 400)


def test_a_long_text_is_one_value_whatever_is_in_it() -> None:
    program = 'if x["a"] == {1: [2]}:\n    y = "\\\\"\n' * 200_000
    call = parse_chat(
        json.dumps({"model": "m", "messages": [{"role": "user", "content": program}]}).encode(), GatewayConfig()
    )
    assert call.messages[0].content == program
    with pytest.raises(LmxError, match="JSON"):
        parse_chat(HEAD[:-1] + b"[{," * MAX_CONTAINERS, GatewayConfig())  # a text that never ends


def test_the_longest_lists_that_are_served_pass() -> None:
    tokens = {"model": "m", "tokens": [7] * 1_048_576}
    assert len(parse_detokenize(json.dumps(tokens).encode(), GatewayConfig()).tokens) == 1_048_576
    prompts = {"model": "m", "prompt": [[7] * 8_000] * 100}
    assert len(parse_completion(json.dumps(prompts).encode(), GatewayConfig()).prompts) == 100


JSON = st.recursive(
    st.none() | st.integers() | st.text(alphabet='ab"\\{[,é'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def counts(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(map(counts, value.values()))
    return 1 + sum(map(counts, value)) if isinstance(value, list) else 0


@given(JSON)
def test_what_stands_in_texts_is_never_counted(value: Any) -> None:
    body = json.dumps(value).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight, "_SMALL_BYTES", 0)
        patch.setattr(weight, "MAX_CONTAINERS", counts(value))
        check_weight(body)
        patch.setattr(weight, "MAX_CONTAINERS", counts(value) - 1)
        if counts(value):
            with pytest.raises(LmxError):
                check_weight(body)


def test_the_look_at_a_body_reads_nothing_of_what_it_does_not_want() -> None:
    wanted = wanted_of(b'{"model": [' + b"[]," * 100 + b'[]], "n": {"a": 1}, "max_tokens": "' + b"9" * 9000 + b'"}')
    assert wanted is not None
    assert wanted.model_name == ""
    assert estimate(wanted, 400, "/chat/completions", 10_000) == 512 + 101
    named = wanted_of(b'{"model": "t\\u0069ny", "max_tokens": 5, "n": 2}')
    assert named is not None
    assert named.model_name == "tiny"
    assert estimate(named, 4, "/chat/completions", 10_000) == 12
