"""Tools, thinking, roles and lengths of conversations, with templates as models bring them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gateway.tools
import worker.options
from protocol.data import ChatMessage, ChatOptions, Kind, Sampling, Submit, ToolCall, ToolChoice
from protocol.errors import LmxError
from tests.modelkit import CHATML, make_tiny_model
from worker.jobs import Pace

LOOK = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}
SUM = {"type": "function", "function": {"name": "sum", "parameters": {"type": "object", "properties": {"a": {}}}}}
TOOLS = json.dumps([LOOK, SUM]).encode()

#: As Qwen's: tools and calls in the template, thinking with a switch, an open block when it is on.
QWEN = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<tool_call><|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% if message.tool_calls %}{% for tool_call in message.tool_calls %}<tool_call>{{ tool_call.function.name }}"
    "{{ tool_call.function.arguments | tojson }}</tool_call>{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
SILENT_SYSTEM = CHATML.replace(
    "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from mlx_lm.tool_parsers import json_tools
    from transformers import AutoTokenizer

    from worker.prompt import PromptMaker

    folder: Path = make_tiny_model(tmp_path_factory.mktemp("model"))

    def make_maker(template: str = CHATML, *, thinks: bool = False, native: bool = False, context: int = 1000) -> Any:
        inner = AutoTokenizer.from_pretrained(folder)
        inner.chat_template = template
        if thinks:
            inner.add_tokens(["<think>", "</think>"])
        more = (
            {
                "tool_call_start": "<tool_call>",
                "tool_call_end": "</tool_call>",
                "tool_parser": json_tools.parse_tool_call,
            }
            if native
            else {}
        )
        tokenizer = TokenizerWrapper(inner, eos_token_ids=[inner.eos_token_id], **more)
        return PromptMaker(tokenizer, max_model_len=context, eos=frozenset(tokenizer.eos_token_ids))

    return make_maker


def submit(*messages: ChatMessage, max_tokens: int | None = None, **options: Any) -> Submit:
    talk = list(messages) or [ChatMessage("user", "the sea")]
    return Submit(1, 1, Kind.CHAT, talk, Sampling(max_tokens=max_tokens), 10.0, options=ChatOptions(**options))


def prompt(maker: Any, message: Submit) -> str:
    return str(maker._tokenizer.decode(maker.prepare(message).prompt))


def refusal(maker: Any, message: Submit) -> LmxError:
    with pytest.raises(LmxError) as caught:
        maker.prepare(message)
    return caught.value


def say(maker: Any, message: Submit, text: str) -> Any:
    """Return text, reasoning and calls of an answer that the model gives to the message."""
    answer = maker.prepare(message).answer
    said = [answer.add(token) for token in maker._tokenizer.encode(text, add_special_tokens=False)]
    if not answer.stopped:
        said.append(answer.finish())
    calls: dict[int, list[str]] = {}
    for delta in (delta for one in said for delta in one.tool_calls):
        call = calls.setdefault(delta.index, ["", ""])
        call[0] += delta.name
        call[1] += delta.arguments
    return "".join(one.text for one in said), "".join(one.reasoning for one in said), list(calls.values())


# -- tools ------------------------------------------------------------------------------------------------------


def test_a_template_with_tools_is_given_them(make: Any) -> None:
    maker = make(QWEN, native=True)
    told = prompt(maker, submit(tools=TOOLS))
    assert '"name": "look"' in told
    assert told.count("Tools:") == 1
    call = '<tool_call>\n{"name": "sum", "arguments": {"a": 1}}\n</tool_call>'
    assert say(maker, submit(tools=TOOLS), f"ok {call}") == ("ok", "", [["sum", '{"a": 1}']])


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM, SILENT_SYSTEM, QWEN])
def test_a_template_without_tools_or_with_unreadable_ones_has_them_told_in_words(make: Any, template: str) -> None:
    maker = make(template)
    told = prompt(maker, submit(ChatMessage("system", "be kind"), ChatMessage("user", "the sea"), tools=TOOLS))
    assert told.count('{"name": "look", "description": "d"') == 1
    assert "be kind" in told
    assert "Tools:" not in told
    call = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
    assert say(maker, submit(tools=TOOLS), call) == ("", "", [["look", "{}"]])


def test_with_choice_none_tools_are_neither_shown_nor_looked_for(make: Any) -> None:
    maker = make()
    message = submit(tools=TOOLS, tool_choice=ToolChoice.NONE)
    assert "look" not in prompt(maker, message)
    call = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
    assert say(maker, message, call) == (call, "", [])


def test_calls_and_results_of_the_past_are_told_in_the_templates_form(make: Any) -> None:
    talk = [
        ChatMessage("user", "the sea"),
        ChatMessage("assistant", "", tool_calls=(ToolCall("call_1", "sum", '{"a": 1}'),)),
        ChatMessage("tool", "two", tool_call_id="call_1"),
        ChatMessage("tool", "three", tool_call_id="call_2"),
    ]
    native = prompt(make(QWEN, native=True), submit(*talk, tools=TOOLS))
    assert '<tool_call>sum{"a": 1}</tool_call>' in native
    assert "<|im_start|>tool\ntwo<|im_end|>" in native
    plain = prompt(make(), submit(*talk))
    assert '<tool_call>\n{"name": "sum", "arguments": {"a": 1}}\n</tool_call>' in plain
    results = "<tool_response>\ntwo\n</tool_response>\n<tool_response>\nthree\n</tool_response>"
    assert f"<|im_start|>user\n{results}<|im_end|>" in plain


def test_a_template_that_wants_arguments_as_text_gets_text(make: Any) -> None:
    wants_text = (
        "{% for message in messages %}{{ message.content }}{% for call in message.tool_calls or [] %}"
        "{{ 'call ' + call.function.arguments }}{% endfor %}{% endfor %}{% if tools %}{% endif %}"
    )
    talk = [
        ChatMessage("user", "the sea"),
        ChatMessage("assistant", "", tool_calls=(ToolCall("1", "sum", '{"a": 1}'),)),
    ]
    assert 'call {"a": 1}' in prompt(make(wants_text, native=True), submit(*talk))


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": b"{}"}, "tools"),
        ({"tools": b"[" * 5000}, "tools"),
        ({"tools": b"[1]"}, "tools"),
        ({"tools": b"[{}]"}, "tools[0]"),
        ({"tools": b'[{"type": "code"}]'}, "tools[0]"),
        ({"tools": b'[{"type": "function", "function": {"name": "a b"}}]'}, "tools[0].function.name"),
        ({"tools": b'[{"type": "function", "function": {"name": 3}}]'}, "tools[0].function.name"),
        ({"tools": json.dumps([LOOK, LOOK]).encode()}, "tools[1].function.name"),
        (
            {"tools": b'[{"type": "function", "function": {"name": "a", "parameters": 3}}]'},
            "tools[0].function.parameters",
        ),
        ({"tools": json.dumps([LOOK] * 129).encode()}, "tools"),
        ({"tools": TOOLS, "tool_choice": ToolChoice.NAMED, "tool_name": "other"}, "tool_choice"),
        ({"tool_choice": ToolChoice.REQUIRED}, "tool_choice"),
        ({"tools": TOOLS, "json_object": True}, "response_format"),
        ({"template_args": b"[]"}, "chat_template_kwargs"),
        ({"template_args": b'{"chat_template": "x"}'}, "chat_template_kwargs"),
        ({"template_args": b'{"messages": []}'}, "chat_template_kwargs"),
        ({"template_args": b'{"tools": []}'}, "chat_template_kwargs"),
        ({"template_args": b'{"tokenize": false}'}, "chat_template_kwargs"),
        ({"template_args": b'{"unheard_of": 1}'}, "chat_template_kwargs"),
        ({"template_args": b'{"a": "' + b"x" * 20_000 + b'"}'}, "chat_template_kwargs"),
        ({"reasoning": True}, "enable_thinking"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(make: Any, options: dict[str, Any], param: str) -> None:
    error = refusal(make(), submit(**options))
    assert error.param == param
    assert error.spec.status == 400


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        (
            {"json_schema": b'{"type": "object"}'},
            "response_format",
            # What LangChain looks for, to go on without.
            "'response_format' of type 'json_schema' is not supported with this model",
        ),
        ({"json_object": True}, "response_format", "of type 'json_object' is not supported with this model"),
        ({"tools": TOOLS, "tool_choice": ToolChoice.REQUIRED}, "tool_choice", "cannot be held to a call"),
    ],
)
def test_a_model_that_cannot_be_held_to_a_grammar_says_so_in_words_that_clients_know(
    make: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], param: str, words: str
) -> None:
    maker = make()
    monkeypatch.setattr(maker, "_eos", frozenset())
    error = refusal(maker, submit(**options))
    assert (error.code, error.param) == ("unsupported_parameter", param)
    assert words in error.message


def test_the_gateway_lets_nothing_through_that_a_worker_refuses() -> None:
    assert gateway.tools.TOOL_NAME.pattern == worker.options.TOOL_NAME.pattern
    assert gateway.tools.RESERVED_ARGS == worker.options.RESERVED_ARGS
    assert gateway.tools.MAX_TEMPLATE_ARGS_BYTES == worker.options.MAX_TEMPLATE_ARGS_BYTES
    assert gateway.tools.MAX_TOOLS == worker.options.MAX_TOOLS


# -- thinking ---------------------------------------------------------------------------------------------------


def test_thinking_is_switched_through_the_template(make: Any) -> None:
    maker = make(QWEN, thinks=True)
    assert prompt(maker, submit()).endswith("assistant\n<think>\n")
    for off in ({"reasoning": False}, {"reasoning_effort": "none"}, {"template_args": b'{"enable_thinking": false}'}):
        assert prompt(maker, submit(**off)).endswith("</think>\n\n")
        assert say(maker, submit(**off), "the sea") == ("the sea", "", [])
    assert say(maker, submit(), "so it is</think>\n\nthe sea") == ("the sea", "so it is", [])
    assert say(maker, submit(reasoning_effort="low"), "so it") == ("", "so it", [])


def test_a_model_that_never_thinks_may_be_told_not_to(make: Any) -> None:
    for off in ({"reasoning": False}, {"reasoning_effort": "none"}, {"template_args": b'{"enable_thinking": false}'}):
        assert prompt(make(), submit(**off)) == prompt(make(), submit())


def test_a_model_that_always_thinks_cannot_be_told_not_to(make: Any) -> None:
    error = refusal(make(thinks=True), submit(reasoning=False))
    assert (error.code, error.param) == ("unsupported_parameter", "enable_thinking")
    assert say(make(thinks=True), submit(), "<think>\nhm</think>\nyes") == ("yes", "hm", [])


def test_effort_goes_to_a_template_that_knows_it(make: Any) -> None:
    maker = make("{{ reasoning_effort or 'medium' }}" + CHATML)
    assert prompt(maker, submit(reasoning_effort="high")).startswith("high")
    assert prompt(maker, submit(template_args=b'{"reasoning_effort": "low"}')).startswith("low")


# -- roles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [NO_SYSTEM, SILENT_SYSTEM])
def test_a_system_message_reaches_a_model_whose_template_has_none(make: Any, template: str) -> None:
    maker = make(template)
    for role in ("system", "developer"):
        told = prompt(maker, submit(ChatMessage(role, "be kind"), ChatMessage("user", "the sea")))
        assert told.startswith("<|im_start|>user\nbe kind\n\nthe sea<|im_end|>")
    assert prompt(maker, submit()).startswith("<|im_start|>user\nthe sea")


def test_a_system_message_in_the_middle_is_moved_for_a_template_that_wants_it_first(make: Any) -> None:
    strict = (
        "{% for message in messages %}{% if message.role == 'system' and not loop.first %}"
        "{{ raise_exception('first!') }}{% endif %}{% endfor %}" + CHATML
    )
    talk = (ChatMessage("user", "the sea"), ChatMessage("system", "be kind"), ChatMessage("user", "the land"))
    assert prompt(make(strict), submit(*talk)).startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user")


# -- lengths ----------------------------------------------------------------------------------------------------


def test_the_oldest_turns_go_until_prompt_and_answer_fit(make: Any) -> None:
    talk = [ChatMessage("system", "be kind")]
    for number in range(30):
        talk += [ChatMessage("user", f"the sea {number}"), ChatMessage("assistant", "the land")]
    talk.append(ChatMessage("user", "the end"))
    maker = make(context=300)
    assert refusal(maker, submit(*talk)).code == "context_length_exceeded"
    prepared = maker.prepare(submit(*talk, max_tokens=100, truncate_oldest=True))
    assert 150 < len(prepared.prompt) <= 200
    assert prepared.max_tokens == 100
    told = maker._tokenizer.decode(prepared.prompt)
    assert told.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nthe sea 2")
    assert "the end" in told
    free = maker.prepare(submit(*talk, truncate_oldest=True))
    assert 200 <= len(free.prompt) <= 225


def test_what_never_fits_says_both_numbers(make: Any) -> None:
    talk = (ChatMessage("user", "the"), ChatMessage("user", "the sea " * 400))
    error = refusal(make(context=300), submit(*talk, truncate_oldest=True))
    assert error.code == "context_length_exceeded"
    assert "300 tokens" in error.message


# -- grammars ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "object", "if": {}, "then": {}}, "if, then"),
        ({"$ref": "#"}, "cannot be followed"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "cannot be followed"),
        ({"type": "array", "prefixItems": [{"type": "string"}] * 300, "maxItems": 3, "minItems": 301}, "satisfies it"),
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_refused_in_words(make: Any, schema: dict[str, Any], words: str) -> None:
    error = refusal(make(), submit(json_schema=json.dumps(schema).encode()))
    assert (error.code, error.param) == ("invalid_value", "response_format")
    assert words in error.message


def test_the_parameters_of_a_forced_call_are_refused_as_tools(make: Any) -> None:
    bad = {"type": "function", "function": {"name": "bad", "parameters": {"type": "object", "not": {}}}}
    tools = json.dumps([bad]).encode()
    assert make().prepare(submit(tools=tools)).constraint is None
    error = refusal(make(), submit(tools=tools, tool_choice=ToolChoice.REQUIRED))
    assert (error.code, error.param) == ("invalid_value", "tools")


def test_only_what_takes_long_is_called_slow(make: Any) -> None:
    maker = make()
    assert maker.pace(submit()) is Pace.QUICK
    assert maker.pace(submit(tools=TOOLS)) is Pace.QUICK
    assert maker.pace(submit(json_object=True)) is Pace.GRAMMAR
    assert maker.pace(submit(tools=TOOLS, tool_choice=ToolChoice.REQUIRED)) is Pace.GRAMMAR
    assert maker.pace(submit(ChatMessage("user", "x" * 5000))) is Pace.LONG_TEXT
