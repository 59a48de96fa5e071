"""Every request is either something a worker can be given, or a 400 that names the field."""

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.decode import shorten
from gateway.parameters import CHAT, COMPLETION, ignored_header
from gateway.schemas import ChatRequest, CompletionRequest, Message
from gateway.validate import (
    ChatCall,
    CompletionCall,
    parse_chat,
    parse_completion,
    parse_detokenize,
    parse_tokenize,
)
from protocol.config import GatewayConfig
from protocol.data import ChatMessage, ChatOptions, Sampling, ToolCall, ToolChoice
from protocol.errors import LmxError
from tests.bodykit import GOOD, bodies

CONFIG = GatewayConfig()
HELLO = {"role": "user", "content": "hello"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
NAMES = st.sampled_from(
    sorted({*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__, *CHAT.neutral, "tokens", "name"})
)


def assistant(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", **fields}


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def schema(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", **fields}}


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
        ({"messages": [{"role": "tool", "content": ""}]}, "missing_field", "messages[0].tool_call_id"),
        ({"messages": [{"role": "function", "content": ""}]}, "unsupported_parameter", "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": "", "tool_calls": [CALL]}]},
            "invalid_value",
            "messages[0].tool_calls",
        ),
        ({"messages": [assistant(audio={"id": "x"})]}, "unsupported_parameter", "messages[0].audio"),
        ({"messages": [assistant(function_call={})]}, "unsupported_parameter", "messages[0].function_call"),
        ({"messages": [assistant(tool_calls=[{"id": "1"}])]}, "missing_field", "messages[0].tool_calls[0].function"),
        ({"messages": [assistant(tool_calls=[{}])]}, "missing_field", "messages[0].tool_calls[0].id"),
        (
            {"messages": [assistant(tool_calls=[{**CALL, "type": "custom"}])]},
            "unsupported_parameter",
            "messages[0].tool_calls[0].type",
        ),
        (
            {"messages": [assistant(tool_calls=[{**CALL, "function": {"name": "f", "arguments": {}}}])]},
            "invalid_type",
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"messages": [assistant(tool_calls=[{**CALL, "function": {"name": "", "arguments": ""}}])]},
            "invalid_value",
            "messages[0].tool_calls[0].function.name",
        ),
        ({"messages": [assistant(tool_calls=[CALL] * 129)]}, "invalid_value", "messages[0].tool_calls"),
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
            {"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}]},
            "unsupported_parameter",
            "messages[0].content[0].type",
        ),
        ({"messages": [assistant(content=[{"type": "refusal"}])]}, "missing_field", "messages[0].content[0].refusal"),
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
        ({"tools": {}}, "invalid_type", "tools"),
        ({"tools": [{"type": "function"}]}, "missing_field", "tools[0].function"),
        ({"tools": [{"function": {"name": "f"}}]}, "missing_field", "tools[0].type"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "unsupported_parameter", "tools[0].type"),
        ({"tools": [tool("f"), tool("a b")]}, "invalid_value", "tools[1].function.name"),
        ({"tools": [tool("x" * 65)]}, "invalid_value", "tools[0].function.name"),
        ({"tools": [tool("f"), tool("f")]}, "invalid_value", "tools[1].function.name"),
        ({"tools": [tool("f", parameters=[])]}, "invalid_type", "tools[0].function.parameters"),
        ({"tools": [tool(f"f{n}") for n in range(129)]}, "invalid_value", "tools"),
        ({"tools": [tool("f", description="x" * 2**20)]}, "invalid_value", "tools"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tool_choice": "any", "tools": [tool("f")]}, "invalid_value", "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "missing_field", "tool_choice.function"),
        ({"tool_choice": {"type": "allowed_tools"}}, "unsupported_parameter", "tool_choice.type"),
        ({"tool_choice": named("g"), "tools": [tool("f")]}, "invalid_value", "tool_choice.function.name"),
        ({"parallel_tool_calls": 1}, "invalid_type", "parallel_tool_calls"),
        ({"response_format": {"type": "grammar"}}, "unsupported_parameter", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "missing_field", "response_format.json_schema"),
        ({"response_format": schema(name=None)}, "invalid_type", "response_format.json_schema.name"),
        ({"response_format": schema(name="a b")}, "invalid_value", "response_format.json_schema.name"),
        ({"response_format": schema(schema=[])}, "invalid_type", "response_format.json_schema.schema"),
        ({"response_format": schema(schema="x")}, "invalid_type", "response_format.json_schema.schema"),
        ({"response_format": schema(schema={"a": "x" * 2**18})}, "invalid_value", "response_format.json_schema.schema"),
        ({"response_format": "json"}, "invalid_type", "response_format"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 17}, "invalid_value", "n"),
        ({"n": True}, "invalid_type", "n"),
        ({"logprobs": 1}, "invalid_type", "logprobs"),
        ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"the": 5}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"-1": 5}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"\u0663": 5}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"9" * 5000: 5}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {str(n): 5 for n in range(1025)}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"1": "5"}}, "invalid_type", "logit_bias"),
        ({"logit_bias": [1]}, "invalid_type", "logit_bias"),
        ({"presence_penalty": 2.1}, "invalid_value", "presence_penalty"),
        ({"frequency_penalty": -2.1}, "invalid_value", "frequency_penalty"),
        ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
        ({"repetition_penalty": 2.1}, "invalid_value", "repetition_penalty"),
        ({"top_k": -2}, "invalid_value", "top_k"),
        ({"min_p": 1.1}, "invalid_value", "min_p"),
        ({"truncation": "newest"}, "invalid_value", "truncation"),
        ({"chat_template": "{{ 1 }}"}, "unsupported_parameter", "chat_template"),
        ({"chat_template_kwargs": []}, "invalid_type", "chat_template_kwargs"),
        (
            {"chat_template_kwargs": {"chat_template": "x"}},
            "unsupported_parameter",
            "chat_template_kwargs.chat_template",
        ),
        ({"chat_template_kwargs": {"a": "x" * 2**16}}, "invalid_value", "chat_template_kwargs"),
        ({"enable_thinking": True, "reasoning_effort": "none"}, "invalid_value", "enable_thinking"),
        ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
        ({"audio": {}}, "unsupported_parameter", "audio"),
        ({"prediction": {"type": "content"}}, "unsupported_parameter", "prediction"),
        ({"web_search_options": {}}, "unsupported_parameter", "web_search_options"),
        ({"verbosity": "low"}, "unsupported_parameter", "verbosity"),
        ({"functions": [{}]}, "unsupported_parameter", "functions"),
        ({"function_call": {"name": "f"}}, "unsupported_parameter", "function_call"),
        ({"reasoning_effort": "huge"}, "invalid_value", "reasoning_effort"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], code: str, param: str) -> None:
    assert refused(**fields) == (code, param)


@pytest.mark.parametrize("name", CHAT.neutral)
def test_neutral_values_of_unsupported_parameters_are_accepted(name: str) -> None:
    for value in (None, *CHAT.neutral[name]):
        assert parse(**{name: value}).ignored == []


def test_parameters_without_effect_are_accepted() -> None:
    assert parse(**dict.fromkeys(CHAT.without_effect, "x")).ignored == []
    assert complete(**dict.fromkeys(COMPLETION.without_effect, "x")).ignored == []


def test_every_way_to_choose_tokens_reaches_the_worker() -> None:
    call = parse(
        top_k=-1,
        min_p=0.5,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=1.5,
        logit_bias={"0": -100, "42": 1.5},
        logprobs=True,
        top_logprobs=20,
        temperature=0,
        n=16,
    )
    assert call.n == 16
    assert call.sampling == Sampling(
        temperature=0.0,
        min_p=0.5,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        repetition_penalty=1.5,
        logit_bias={0: -100.0, 42: 1.5},
        logprobs=20,
    )
    assert parse(top_k=40).sampling.top_k == 40
    assert [parse(logprobs=given).sampling.logprobs for given in (True, False, None)] == [0, None, None]


def test_what_shapes_an_answer_reaches_the_worker() -> None:
    tools = [tool("f", parameters={"type": "object", "properties": {}}), tool("g")]
    call = parse(
        tools=tools,
        tool_choice=named("g"),
        parallel_tool_calls=False,
        response_format=schema(schema={"type": "object"}, strict=True),
        chat_template_kwargs={"style": 1},
        reasoning_effort="high",
        truncation="oldest",
    )
    assert json.loads(call.options.tools) == tools
    assert call.options == ChatOptions(
        tools=call.options.tools,
        tool_choice=ToolChoice.NAMED,
        tool_name="g",
        parallel_tool_calls=False,
        json_schema=b'{"type":"object"}',
        template_args=b'{"style":1}',
        reasoning_effort="high",
        truncate_oldest=True,
    )
    choices = [parse(tools=tools, tool_choice=word).options.tool_choice for word in ("none", "auto", "required", None)]
    assert choices == [ToolChoice.NONE, ToolChoice.AUTO, ToolChoice.REQUIRED, ToolChoice.AUTO]
    assert parse(response_format={"type": "json_object"}).options.json_object
    assert parse(response_format=schema()).options.json_object
    assert parse(response_format={"type": "text"}).options == parse().options == ChatOptions()
    assert parse(reasoning_effort="none").options == ChatOptions(reasoning_effort="none")
    assert parse(enable_thinking=False).options == ChatOptions(reasoning=False)


def test_the_configuration_truncates_unless_the_request_says() -> None:
    oldest = GatewayConfig(truncation="oldest")
    body = {"model": "m", "messages": [HELLO]}
    assert parse_chat(msgspec.json.encode(body), oldest).options.truncate_oldest
    assert not parse_chat(msgspec.json.encode({**body, "truncation": "none"}), oldest).options.truncate_oldest


def test_tool_calls_and_their_results_are_turns() -> None:
    call = parse(
        messages=[
            HELLO,
            assistant(content=None, tool_calls=[CALL], reasoning_content="hm", refusal=None, annotations=[]),
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "5"}]},
            assistant(content=[{"type": "refusal", "refusal": "no"}]),
            assistant(refusal="never"),
        ]
    )
    assert call.ignored == []
    assert call.messages[1:] == [
        ChatMessage("assistant", "", tool_calls=(ToolCall("c1", "f", '{"x":1}'),), reasoning="hm"),
        ChatMessage("tool", "5", tool_call_id="c1"),
        ChatMessage("assistant", "no"),
        ChatMessage("assistant", "never"),
    ]


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


def test_unknown_fields_are_named_wherever_they_are() -> None:
    assert parse(zeta=1, **{"a b": 2}).ignored == ["zeta", "a b"]
    call = parse(
        messages=[
            {**HELLO, "cache": 1},
            {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}], "cache": 2},
            assistant(tool_calls=[{**CALL, "index": 0}]),
        ],
        tools=[{**tool("f", deep=1), "eager": True}],
        stream=True,
        stream_options={"continuous_usage_stats": True},
        response_format={**schema(color=1), "more": 1},
    )
    assert sorted(call.ignored) == [
        "messages.cache",
        "messages.content.cache_control",
        "messages.tool_calls.index",
        "response_format.json_schema.color",
        "response_format.more",
        "stream_options.continuous_usage_stats",
        "tools.eager",
        "tools.function.deep",
    ]
    # What a schema or an argument holds is nobody's parameter.
    inner = parse(tools=[tool("f", parameters={"zeta": 1})], chat_template_kwargs={"zeta": 1}, metadata={"zeta": 1})
    assert inner.ignored == []


def test_strict_refuses_unknown_fields() -> None:
    strict = GatewayConfig(strict=True)
    for extra, param in (({"zeta": 1}, "zeta"), ({"messages": [{**HELLO, "x": 1}]}, "messages.x"), ({"é": 1}, "?")):
        body = msgspec.json.encode({"model": "m", "messages": [HELLO], **extra})
        with pytest.raises(LmxError) as caught:
            parse_chat(body, strict)
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", param)
    body = msgspec.json.encode({"model": "m", "messages": [HELLO], "user": "u", "n": 1})
    assert parse_chat(body, strict).ignored == []


# -- completions, tokens ------------------------------------------------------------------------------------------


def complete(**fields: Any) -> CompletionCall:
    return parse_completion(msgspec.json.encode({"model": "m", "prompt": "p", **fields}), CONFIG)


def test_prompts_of_every_kind() -> None:
    assert complete(prompt="a").prompts == ["a"]
    assert complete(prompt="").prompts == [""]
    assert complete(prompt=["a", "b"]).prompts == ["a", "b"]
    assert complete(prompt=[1, 2]).prompts == [[1, 2]]
    assert complete(prompt=[[1, 2], [3]]).prompts == [[1, 2], [3]]
    assert complete(prompt=[[1, 2], "a"]).prompts == [[1, 2], "a"]


def test_completion_defaults_are_openais() -> None:
    call = complete()
    assert call.sampling == Sampling(max_tokens=16, temperature=CONFIG.default_temperature)
    assert (call.n, call.best_of, call.echo, call.logprobs, call.stream) == (1, 1, False, False, False)
    assert complete(echo=True, max_tokens=0, logprobs=5).sampling.max_tokens == 0
    assert complete(logprobs=0).sampling.logprobs == 0
    # The best is known by its log probabilities.
    assert (complete(best_of=3).sampling.logprobs, complete(best_of=3).logprobs) == (0, False)
    assert complete(n=2, suffix="", user="x", strange=1).ignored == ["strange"]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": None}, "invalid_type", "prompt"),
        ({"prompt": 1}, "invalid_type", "prompt"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": [[]]}, "invalid_value", "prompt[0]"),
        ({"prompt": [1, "a"]}, "invalid_value", "prompt"),
        ({"prompt": [[1], 1]}, "invalid_value", "prompt"),
        ({"prompt": [[1.5]]}, "invalid_type", "prompt[0][0]"),
        ({"prompt": [-1]}, "invalid_value", "prompt"),
        ({"prompt": ["a", [2**31]]}, "invalid_value", "prompt[1]"),
        ({"prompt": [10**30]}, "invalid_value", "prompt"),
        ({"prompt": ["a"] * 129}, "invalid_value", "prompt"),
        ({"prompt": ["a"] * 128, "n": 5}, "invalid_value", "prompt"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"logprobs": 6}, "invalid_value", "logprobs"),
        ({"logprobs": True}, "invalid_type", "logprobs"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "invalid_value", "max_tokens"),
        ({"n": 3, "best_of": 2}, "invalid_value", "best_of"),
        ({"best_of": 21}, "invalid_value", "best_of"),
        ({"best_of": 2, "stream": True}, "invalid_value", "best_of"),
        ({"stream_options": {}}, "invalid_value", "stream_options"),
        ({"echo": "yes"}, "invalid_type", "echo"),
    ],
)
def test_bad_completion_fields_are_named(fields: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(LmxError) as caught:
        complete(**fields)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_tokenizing_a_text_or_a_conversation() -> None:
    text = parse_tokenize(b'{"model":"m","prompt":"x","add_special_tokens":true}', CONFIG)
    assert (text.prompt, text.messages, text.ignored) == ("x", [], [])
    body = {"model": "m", "messages": [HELLO], "tools": [tool("f")], "chat_template_kwargs": {"a": 1}}
    chat = parse_tokenize(msgspec.json.encode(body), CONFIG)
    assert (chat.prompt, chat.options.template_args) == (None, b'{"a":1}')
    assert json.loads(chat.options.tools) == [tool("f")]
    assert parse_tokenize(msgspec.json.encode({**body, "add_generation_prompt": True}), CONFIG).ignored == []
    assert parse_detokenize(b'{"model":"m","tokens":[1,2]}', CONFIG).tokens == [1, 2]
    assert parse_detokenize(b'{"model":"m","tokens":[]}', CONFIG).tokens == []


@pytest.mark.parametrize(
    ("parse_body", "body", "code", "param"),
    [
        (parse_tokenize, b'{"model":"m"}', "missing_field", "prompt"),
        (parse_tokenize, b'{"model":"m","prompt":"x","messages":[]}', "invalid_value", "prompt"),
        (parse_tokenize, b'{"model":"m","messages":[]}', "invalid_value", "messages"),
        (
            parse_tokenize,
            b'{"model":"m","prompt":"x","add_special_tokens":false}',
            "unsupported_parameter",
            "add_special_tokens",
        ),
        (
            parse_tokenize,
            b'{"model":"m","messages":[{"role":"user","content":"x"}],"add_generation_prompt":false}',
            "unsupported_parameter",
            "add_generation_prompt",
        ),
        (parse_detokenize, b'{"model":"m"}', "missing_field", "tokens"),
        (parse_detokenize, b'{"model":"m","tokens":[-1]}', "invalid_value", "tokens"),
        (parse_detokenize, b'{"model":"m","tokens":"x"}', "invalid_type", "tokens"),
        (parse_detokenize, b'{"model":"","tokens":[]}', "invalid_value", "model"),
    ],
)
def test_bad_token_requests_are_named(
    parse_body: Callable[[bytes, GatewayConfig], object], body: bytes, code: str, param: str
) -> None:
    with pytest.raises(LmxError) as caught:
        parse_body(body, CONFIG)
    assert (caught.value.code, caught.value.param) == (code, param)


# -- all of them --------------------------------------------------------------------------------------------------


def test_the_ignored_header_is_bounded_and_safe() -> None:
    assert ignored_header(["top_k", "a\r\nb", "é", "x" * 65, ""]) == b"top_k, ?, ?, ?, ?"
    assert ignored_header([f"f{i}" for i in range(1000)]).endswith(b"f15, ...")


def test_the_last_of_two_equal_keys_wins() -> None:
    body = b'{"model":"a","model":"b","messages":[{"role":"user","content":"x"}]}'
    assert parse_chat(body, CONFIG).model == "b"


def test_errors_quote_no_content() -> None:
    for body in (b'{"secret-prompt"', b'{"model":"secret-prompt","messages":["secret-prompt"]}', b'"secret-prompt"'):
        assert "secret-prompt" not in refusal(body).message


def test_shorten_is_safe_to_repeat() -> None:
    assert shorten("a\r\nb\u202e") == "a??b?"
    assert shorten("x" * 1000) == "x" * 100 + "…"


PARSERS = {
    parse_chat: {"model": "m", "messages": [HELLO]},
    parse_completion: {"model": "m", "prompt": "p"},
    parse_tokenize: {"model": "m", "prompt": "p"},
    parse_detokenize: {"model": "m", "tokens": [1]},
}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | NAMES, inner, max_size=3),
    max_leaves=6,
)


def is_a_call_or_a_400(parse_body: Callable[[bytes, GatewayConfig], object], body: bytes) -> None:
    refused: LmxError | None = None
    try:
        parse_body(body, CONFIG)
    except LmxError as error:
        refused = error
    assert refused is None or refused.spec.status == 400


@pytest.mark.parametrize("parse_body", PARSERS)
@settings(deadline=None)
@given(fields=st.dictionaries(NAMES | st.text(max_size=5), json_values))
def test_any_object_is_a_call_or_a_400(
    parse_body: Callable[[bytes, GatewayConfig], object], fields: dict[str, Any]
) -> None:
    is_a_call_or_a_400(parse_body, json.dumps({**PARSERS[parse_body], **fields}).encode())


@settings(deadline=None)
@given(
    message=st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system"])},
        optional=dict.fromkeys(Message.__struct_fields__[1:], json_values),
    ),
    tool=st.fixed_dictionaries(
        {"type": st.just("function")},
        optional={
            "function": st.fixed_dictionaries({"name": st.text(max_size=3)}, optional={"parameters": json_values})
        },
    ),
    choice=json_values | st.just({"type": "function", "function": {"name": "f"}}),
    shape=json_values
    | st.fixed_dictionaries({"type": st.just("json_schema"), "json_schema": json_values})
    | json_values.map(lambda value: {"type": "json_schema", "json_schema": {"name": "f", "schema": value}}),
)
def test_any_conversation_is_a_call_or_a_400(message: object, tool: object, choice: object, shape: object) -> None:
    body = {"model": "m", "messages": [message], "tools": [tool], "tool_choice": choice, "response_format": shape}
    is_a_call_or_a_400(parse_chat, json.dumps(body).encode())


@pytest.mark.parametrize(("path", "parse_body"), list(zip(GOOD, PARSERS, strict=True)))
def test_thousands_of_random_bodies_are_calls_or_400s(
    path: str, parse_body: Callable[[bytes, GatewayConfig], object]
) -> None:
    for body in bodies(path, 3000):
        is_a_call_or_a_400(parse_body, json.dumps(body).encode())


@pytest.mark.parametrize("parse_body", PARSERS)
@given(body=st.binary(max_size=60))
def test_any_bytes_are_a_400(parse_body: Callable[[bytes, GatewayConfig], object], body: bytes) -> None:
    with pytest.raises(LmxError) as caught:
        parse_body(body, CONFIG)
    assert caught.value.spec.status == 400
