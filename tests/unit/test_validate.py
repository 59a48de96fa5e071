"""Every request is either something a worker can be given, or a 400 that names the field."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.parameters import NEUTRAL_VALUES, WITHOUT_EFFECT, ignored_header
from gateway.validate import ChatCall, parse_chat, shorten
from protocol.config import GatewayConfig
from protocol.data import ChatMessage
from protocol.errors import LmxError

CONFIG = GatewayConfig()
HELLO = {"role": "user", "content": "hello"}


def parse(**fields: Any) -> ChatCall:
    return parse_chat(msgspec.json.encode({"model": "m", "messages": [HELLO], **fields}), CONFIG)


def refusal(body: bytes) -> LmxError:
    with pytest.raises(LmxError) as caught:
        parse_chat(body, CONFIG)
    assert caught.value.spec.status == 400
    return caught.value


def refused(**fields: Any) -> tuple[str, str | None]:
    error = refusal(msgspec.json.encode({"model": "m", "messages": [HELLO], **fields}))
    return error.code, error.param


def test_defaults() -> None:
    call = parse()
    assert (call.stream, call.include_usage, call.ignored) == (False, False, [])
    assert call.sampling.temperature == CONFIG.default_temperature
    assert (call.sampling.top_p, call.sampling.max_tokens, call.sampling.seed, call.sampling.stop) == (
        1,
        None,
        None,
        (),
    )


def test_all_that_is_supported() -> None:
    call = parse(
        messages=[
            {"role": "system", "content": "s"},
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "é\u0000", "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [], "refusal": None},
            {"role": "assistant"},
        ],
        temperature=2,
        top_p=0.5,
        max_completion_tokens=5,
        seed=-(2**63),
        stop=["a", "b", "c", "d"],
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
    )
    assert call.messages == [
        ChatMessage("system", "s"),
        ChatMessage("developer", "ab"),
        ChatMessage("user", "é\u0000", "ann"),
        ChatMessage("assistant", ""),
        ChatMessage("assistant", ""),
    ]
    assert call.sampling.stop == ("a", "b", "c", "d")
    assert (call.sampling.max_tokens, call.sampling.temperature, call.sampling.seed) == (5, 2.0, -(2**63))
    assert call.stream
    assert call.include_usage


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b"nonsense", "invalid_json", None),
        (b'{"model":"m","messages":[],}', "invalid_json", None),
        (b'{"model":"m"} x', "invalid_json", None),
        (b"\xff\xfe", "invalid_json", None),
        (b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}', "invalid_json", None),
        (b'{"model":"m","messages":[],"unknown":"\xff"}', "invalid_json", None),
        (b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}', "invalid_json", None),
        (b'{"model":"m","messages":[{"role":"user","content":"\\udc00\\ud800"}]}', "invalid_json", None),
        (b'{"model":"m","temperature":NaN}', "invalid_json", None),
        (b'{"model":"m","temperature":Infinity}', "invalid_json", None),
        (b'{"unknown":' + b"[" * 100_000, "invalid_json", None),
        (b'{"tools":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json", None),
        (b'{"messages":' + b'{"a":' * 100_000, "invalid_json", None),
        (b"[]", "invalid_type", None),
        (b"3", "invalid_type", None),
        (b'"text"', "invalid_type", None),
        (b"null", "invalid_type", None),
        (b"{}", "missing_field", "model"),
        (b'{"model":"m"}', "missing_field", "messages"),
        (b'{"model":"m","messages":[{"content":"x"}]}', "missing_field", "messages[0].role"),
        (b'{"model":"m","messages":[],"temperature":1e400}', "invalid_value", "temperature"),
        (b'{"model":"m","messages":[],"seed":' + b"9" * 5000 + b"}", "invalid_value", "seed"),
        (b'{"model":"m","messages":[],"temperature":1' + b"0" * 400 + b"}", "invalid_value", "temperature"),
        (b'{"model":"m","messages":[],"max_tokens":1e400}', "invalid_value", "max_tokens"),
    ],
)
def test_bad_bodies(body: bytes, code: str, param: str | None) -> None:
    error = refusal(body)
    assert (error.code, error.param) == (code, param)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"model": ""}, "invalid_value", "model"),
        ({"model": 3}, "invalid_type", "model"),
        ({"model": None}, "invalid_type", "model"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "hello"}, "invalid_type", "messages"),
        ({"messages": [HELLO] * 257}, "invalid_value", "messages"),
        ({"messages": [HELLO, 1]}, "invalid_type", "messages[1]"),
        ({"messages": [HELLO, HELLO, {"role": "wizard", "content": ""}]}, "invalid_value", "messages[2].role"),
        (
            {"messages": [{"role": "tool", "content": "", "tool_call_id": "x"}]},
            "unsupported_parameter",
            "messages[0].role",
        ),
        ({"messages": [{"role": 1, "content": ""}]}, "invalid_type", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "missing_field", "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "missing_field", "messages[0].content"),
        ({"messages": [{"role": "user", "content": 1}]}, "invalid_type", "messages[0].content"),
        ({"messages": [{"role": "user", "content": {}}]}, "invalid_type", "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": "x" * 257}]}, "invalid_value", "messages[0].name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
            "unsupported_parameter",
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "missing_field",
            "messages[0].content[0].text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "unsupported_parameter",
            "messages[0].tool_calls",
        ),
        ({"temperature": -0.1}, "invalid_value", "temperature"),
        ({"temperature": 2.1}, "invalid_value", "temperature"),
        ({"temperature": True}, "invalid_type", "temperature"),
        ({"temperature": "1"}, "invalid_type", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"top_p": 1.01}, "invalid_value", "top_p"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": -1}, "invalid_value", "max_tokens"),
        ({"max_tokens": 32_769}, "invalid_value", "max_tokens"),
        ({"max_tokens": 10**400}, "invalid_value", "max_tokens"),
        ({"max_tokens": 1.5}, "invalid_type", "max_tokens"),
        ({"max_tokens": True}, "invalid_type", "max_tokens"),
        ({"max_completion_tokens": 0}, "invalid_value", "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "invalid_value", "max_tokens"),
        ({"seed": 2**63}, "invalid_value", "seed"),
        ({"seed": -(2**63) - 1}, "invalid_value", "seed"),
        ({"seed": 10**400}, "invalid_value", "seed"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"stop": ["a", ""]}, "invalid_value", "stop[1]"),
        ({"stop": ["a"] * 5}, "invalid_value", "stop"),
        ({"stop": "x" * 1025}, "invalid_value", "stop"),
        ({"stop": [1]}, "invalid_type", "stop[0]"),
        ({"stop": {}}, "invalid_type", "stop"),
        ({"stream": "yes"}, "invalid_type", "stream"),
        ({"stream": 1}, "invalid_type", "stream"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "invalid_type", "stream_options.include_usage"),
        ({"stream": True, "stream_options": []}, "invalid_type", "stream_options"),
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"tool_choice": "required"}, "unsupported_parameter", "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "unsupported_parameter", "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"n": 2}, "unsupported_parameter", "n"),
        ({"n": True}, "unsupported_parameter", "n"),
        ({"logprobs": True}, "unsupported_parameter", "logprobs"),
        ({"top_logprobs": 3}, "unsupported_parameter", "top_logprobs"),
        ({"logit_bias": {"1": 5}}, "unsupported_parameter", "logit_bias"),
        ({"presence_penalty": 0.1}, "unsupported_parameter", "presence_penalty"),
        ({"frequency_penalty": -1}, "unsupported_parameter", "frequency_penalty"),
        ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
        ({"audio": {}}, "unsupported_parameter", "audio"),
        ({"prediction": {"type": "content"}}, "unsupported_parameter", "prediction"),
        ({"web_search_options": {}}, "unsupported_parameter", "web_search_options"),
        ({"functions": [{}]}, "unsupported_parameter", "functions"),
        ({"function_call": {"name": "f"}}, "unsupported_parameter", "function_call"),
        ({"reasoning_effort": "high"}, "unsupported_parameter", "reasoning_effort"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], code: str, param: str) -> None:
    assert refused(**fields) == (code, param)


@pytest.mark.parametrize("name", NEUTRAL_VALUES)
def test_neutral_values_of_unsupported_parameters_are_accepted(name: str) -> None:
    for value in (None, *NEUTRAL_VALUES[name]):
        assert parse(**{name: value}).ignored == []
    assert parse(presence_penalty=0.0, n=1.0).ignored == []


def test_parameters_without_effect_are_accepted() -> None:
    assert parse(**dict.fromkeys(WITHOUT_EFFECT, "x")).ignored == []


def test_null_means_not_given() -> None:
    optional = (
        "temperature",
        "top_p",
        "max_tokens",
        "max_completion_tokens",
        "seed",
        "stop",
        "stream",
        "stream_options",
    )
    assert parse(**dict.fromkeys(optional)) == parse()


def test_unknown_fields_are_named() -> None:
    assert parse(zeta=1, **{"a b": 2}).ignored == ["zeta", "a b"]


def test_the_ignored_header_is_bounded_and_safe() -> None:
    assert ignored_header(["top_k", "a\r\nb", "é", "x" * 65, ""]) == b"top_k, ?, ?, ?, ?"
    assert ignored_header([f"f{i}" for i in range(1000)]).endswith(b"f15, ...")


def test_the_words_langchain_looks_for() -> None:
    body = {"model": "m", "messages": [HELLO], "response_format": {"type": "json_schema", "json_schema": {}}}
    error = refusal(msgspec.json.encode(body))
    assert "'response_format' of type 'json_schema' is not supported with this model" in error.message


def test_the_last_of_two_equal_keys_wins() -> None:
    body = b'{"model":"a","model":"b","messages":[{"role":"user","content":"x"}]}'
    assert parse_chat(body, CONFIG).model == "b"


def test_errors_quote_no_content() -> None:
    for body in (b'{"secret-prompt"', b'{"model":"secret-prompt","messages":["secret-prompt"]}', b'"secret-prompt"'):
        assert "secret-prompt" not in refusal(body).message


def test_shorten_is_safe_to_repeat() -> None:
    assert shorten("a\r\nb\u202e") == "a??b?"
    assert shorten("x" * 1000) == "x" * 100 + "…"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(sorted({*NEUTRAL_VALUES, *WITHOUT_EFFECT, "temperature", "stop", "seed", "messages", "model"}))


@given(st.dictionaries(names | st.text(max_size=5), json_values))
def test_any_object_is_a_call_or_a_400(fields: dict[str, Any]) -> None:
    body = json.dumps({"model": "m", "messages": [HELLO], **fields}).encode()
    try:
        parse_chat(body, CONFIG)
    except LmxError:
        refusal(body)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_400(body: bytes) -> None:
    refusal(body)
