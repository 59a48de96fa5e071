"""Answers taken apart: thoughts, text and tool calls, however the text was cut."""

import importlib
import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.data import ToolDelta
from worker.detok import AnswerText, StopStrings, TokenText
from worker.jobs import NOTHING, Said
from worker.reasoning import Reasoning
from worker.splitting import Plain, Splitter, joined
from worker.toolcalls import GENERIC, Calls, CallSyntax, ForcedCall

TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("look", "sum")]
LOOK = '{"name": "look", "arguments": {"where": "über </b> \\"x\\" [there]"}}'
SUM = '{"name": "sum", "arguments": {"a": [1, 2, {"b": "}"}]}}'


def calls(*, parallel: bool = True, syntax: CallSyntax = GENERIC) -> Calls:
    return Calls(syntax, TOOLS, parallel=parallel)


def reasoning(then: Splitter, *, is_open: bool = False) -> Reasoning:
    return Reasoning("<think>", "</think>", then, is_open=is_open)


def through(splitter: Splitter, pieces: Sequence[str]) -> Said:
    said = NOTHING
    for piece in pieces:
        said = joined(said, splitter.add(piece))
    return joined(said, splitter.finish())


def whole(said: Said) -> tuple[str, str, list[tuple[int, str, str]]]:
    """Return text, reasoning and the calls put together, as a client does."""
    together: dict[int, list[str]] = {}
    for delta in said.tool_calls:
        if delta.index not in together:
            assert delta.id.startswith("call_")
            assert len(delta.id) == 29
            assert delta.name
            together[delta.index] = [delta.name, ""]
        else:
            assert not delta.id
            assert not delta.name
        together[delta.index][1] += delta.arguments
    assert list(together) == list(range(len(together)))
    return said.text, said.reasoning, [(index, *call) for index, call in together.items()]  # type: ignore[misc]


def split(text: str, cuts: Sequence[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


PIECES = st.lists(
    st.sampled_from(
        [
            "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool", "_call>", "<", ">", " ", "\n", "word", "ä",
            LOOK, SUM, '{"name": "look"', '{"name": "unknown", "arguments": {}}', "}", '"', "</",
        ]
    ),
    max_size=14,
)  # fmt: skip


@given(PIECES, st.lists(st.integers(0, 10_000), max_size=40), st.booleans(), st.booleans(), st.booleans())
def test_an_answer_is_the_same_however_it_is_cut(
    parts: list[str], cuts: list[int], is_open: bool, parallel: bool, thinks: bool
) -> None:
    text = "".join(parts)

    def make() -> Splitter:
        inner = calls(parallel=parallel)
        return reasoning(inner, is_open=is_open) if thinks else inner

    at_once = whole(through(make(), [text]))
    assert whole(through(make(), split(text, cuts))) == at_once
    assert whole(through(make(), list(text))) == at_once


@given(PIECES, st.lists(st.integers(0, 10_000), max_size=20))
def test_nothing_but_white_space_and_markers_of_found_things_is_lost(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    said = through(calls(), split(text, cuts))
    expected = "".join(text.split())
    for delta in said.tool_calls:
        source = LOOK if delta.name == "look" else SUM
        body = "".join(f"<tool_call>{source}</tool_call>".split())
        if body not in expected:  # its end marker never came
            body = body.removesuffix("</tool_call>")
        assert body in expected
        expected = expected.replace(body, "", 1)
    assert "".join(said.text.split()) == expected


@given(
    st.text(alphabet='ab<think>/ \n"', max_size=60), st.lists(st.sampled_from(["<", "</th", "a", "k>b"]), max_size=3),
    st.lists(st.integers(0, 10_000), max_size=30), st.booleans(),
)  # fmt: skip
def test_stop_strings_and_markers_together_do_not_depend_on_the_cuts(
    text: str, stops: list[str], cuts: list[int], is_open: bool
) -> None:
    def run(pieces: Sequence[str]) -> tuple[str, str, list[tuple[int, str, str]]]:
        vocabulary = list(dict.fromkeys(pieces))
        tokens = TokenText(lambda window: "".join(vocabulary[token] for token in window), frozenset())
        answer = AnswerText(tokens, StopStrings(stops), reasoning(calls(), is_open=is_open))
        said = NOTHING
        for piece in pieces:
            said = joined(said, answer.add(vocabulary.index(piece)))
            if answer.stopped:
                return whole(said)
        return whole(joined(said, answer.finish()))

    by_letter = run(list(text))
    assert run([piece for piece in split(text, cuts) if piece]) == by_letter


@given(st.sampled_from([LOOK, SUM]), st.lists(st.integers(0, 10_000), max_size=60))
def test_a_forced_call_streams_name_first_and_its_arguments_are_whole(source: str, cuts: list[int]) -> None:
    splitter = ForcedCall()
    said = through(splitter, split(source, cuts))
    parsed = json.loads(source)
    text, thought, found = whole(said)
    assert (text, thought) == ("", "")
    ((_, name, arguments),) = found
    assert name == parsed["name"]
    assert json.loads(arguments) == parsed["arguments"]
    assert splitter.done


def test_a_forced_call_grows() -> None:
    splitter = ForcedCall()
    assert splitter.add('{"name": "lo') == NOTHING
    first = splitter.add('ok", "arguments": ').tool_calls
    assert [(delta.index, delta.name, delta.arguments) for delta in first] == [(0, "look", "")]
    assert splitter.add('{"a').tool_calls == [ToolDelta(0, arguments='{"a')]
    assert splitter.add('": 1}}').tool_calls == [ToolDelta(0, arguments='": 1}')]


def test_text_before_a_call_is_content_and_white_space_beside_it_is_not() -> None:
    said = through(calls(), [f"Let me see.\n\n<tool_call>\n{LOOK}\n</tool_call>\n<tool_call>{SUM}</tool_call>\n"])
    text, _, found = whole(said)
    assert text == "Let me see."
    assert [name for _, name, _ in found] == ["look", "sum"]
    assert json.loads(found[0][2]) == {"where": 'über </b> "x" [there]'}
    assert "über" in found[0][2]


@pytest.mark.parametrize(
    "body",
    [
        "not json", "[]", "3", '{"name": 3}', "", '{"name": "other", "arguments": {}}',
        '{"name": "look", "arguments": [1]}',
        '{"name": "look", "arguments": {"a": NaN}}', '{"name": "look", "arguments": "no"}', "[" * 5000,
    ],
)  # fmt: skip
def test_what_does_not_parse_comes_back_as_text(body: str) -> None:
    text = f"so: <tool_call>{body}</tool_call> ok"
    splitter = calls()
    assert whole(through(splitter, [text])) == (text, "", [])
    assert not splitter.called


def test_a_call_without_its_end_marker_is_still_a_call() -> None:
    assert [name for _, name, _ in whole(through(calls(), [f"<tool_call>{LOOK}"]))[2]] == ["look"]


def test_a_call_that_was_cut_off_is_text() -> None:
    text = "x <tool_call>" + LOOK[:20]
    assert whole(through(calls(), [text])) == (text, "", [])


def test_without_parallel_calls_the_first_ends_the_answer() -> None:
    splitter = calls(parallel=False)
    said = splitter.add(f"<tool_call>{LOOK}</tool_call><tool_call>{SUM}</tool_call> more")
    assert splitter.done
    assert [delta.name for delta in said.tool_calls] == ["look"]
    assert splitter.add("x") == NOTHING
    assert whole(joined(said, splitter.finish()))[0] == ""


def test_a_call_longer_than_any_is_text() -> None:
    text = '<tool_call>{"name": "look", "arguments": {"a": "' + "x" * 300_000 + '"}}</tool_call>'
    assert whole(through(calls(), [text])) == (text, "", [])


def test_a_partial_marker_at_the_end_is_given_out() -> None:
    splitter = calls()
    assert splitter.add("a <tool_c").text == "a"
    assert splitter.finish().text == " <tool_c"
    thinking = reasoning(Plain(), is_open=True)
    assert thinking.add("hm </thi").reasoning == "hm "
    assert thinking.finish().reasoning == "</thi"


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("<think>\nhm</think>\n\nYes.", False, ("Yes.", "hm")),
        ("hm</think>\n\nYes.", True, ("Yes.", "hm")),
        ("\n<think>hm", False, ("", "hm")),
        ("Yes <think>no</think>", False, ("Yes <think>no</think>", "")),
        ("<thinking", False, ("<thinking", "")),
        ("<think></think>Yes", False, ("Yes", "")),
        ("  Yes", False, ("  Yes", "")),
        ("a</think>b<think>c</think>", True, ("b<think>c</think>", "a")),
    ],
)
def test_thoughts_are_told_from_the_answer(text: str, is_open: bool, expected: tuple[str, str]) -> None:
    said = through(reasoning(Plain(), is_open=is_open), list(text))
    assert (said.text, said.reasoning) == expected


def test_calls_after_thinking() -> None:
    text = f"<think>I call <tool_call> now</think>\n\n<tool_call>\n{SUM}\n</tool_call>"
    said, thought, found = whole(through(reasoning(calls()), list(text)))
    assert (said, thought) == ("", "I call <tool_call> now")
    assert [name for _, name, _ in found] == ["sum"]


def _tool(name: str, **properties: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


WEATHER = _tool("get_weather", city="string", days="integer")
RECORDED = {
    "json_tools": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>',
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}]',
    "qwen3_coder": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        "</function>\n</tool_call>"
    ),
    "pythonic": '<|tool_call_start|>[get_weather(city="Oslo", days=2)]<|tool_call_end|>',
    "glm47": (
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Oslo</arg_value><arg_key>days</arg_key>"
        "<arg_value>2</arg_value></tool_call>"
    ),
    "minimax_m2": (
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Oslo</parameter>\n'
        '<parameter name="days">2</parameter>\n</invoke>\n</minimax:tool_call>'
    ),
    "kimi_k2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Oslo", "days": 2}<|tool_call_end|><|tool_calls_section_end|>'
    ),
    "longcat": '<longcat_tool_call>{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}'
    "</longcat_tool_call>",
    "laguna": (
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Oslo</arg_value><arg_key>days</arg_key>"
        "<arg_value>2</arg_value></tool_call>"
    ),
    "gemma4": '<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>,days:2}<tool_call|>',
    "minicpm5": '<function name="get_weather"><param name="city">Oslo</param><param name="days">2</param></function>',
    "muse_spark": (
        '<atem:function_calls><atem:invoke name="get_weather"><atem:parameter name="city">Oslo</atem:parameter>'
        '<atem:parameter name="days">2</atem:parameter></atem:invoke></atem:function_calls>'
    ),
    "kimi_k3": (
        '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|><|open|>argument key="city" '
        'type="string"<|sep|>Oslo<|close|>argument<|sep|><|open|>argument key="days" type="number"<|sep|>2'
        "<|close|>argument<|sep|><|close|>call<|sep|><|close|>tools<|sep|>"
    ),
    "function_gemma": (
        "<start_function_call>call:get_weather{city:<escape>Oslo<escape>,days:2}<end_function_call>"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
def test_calls_as_models_write_them(name: str) -> None:
    parser = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    syntax = CallSyntax(parser.tool_call_start, parser.tool_call_end, parser.parse_tool_call)
    text = "Sure.\n" + RECORDED[name]
    for pieces in ([text], list(text)):
        said, _, found = whole(through(Calls(syntax, [WEATHER], parallel=True), pieces))
        assert said == "Sure."
        ((_, called, arguments),) = found
        assert called == "get_weather"
        assert json.loads(arguments) == {"city": "Oslo", "days": 2}
    broken = text[: len(text) // 2]
    assert whole(through(Calls(syntax, [WEATHER], parallel=True), [broken])) == (broken, "", [])


def test_special_tokens_are_seen_where_they_are_syntax_and_nowhere_else() -> None:
    vocabulary = ["hi", "<CALL>", "<ARG>", "</CALL>", "<eos>", '{"name":"look"', "}", "bye"]
    syntax = CallSyntax("<CALL>", "</CALL>", lambda text, _: json.loads(text.replace("<ARG>", ',"arguments":{"a":1}')))
    tokens = TokenText(lambda window: "".join(vocabulary[token] for token in window), {1, 2, 3, 4})
    answer = AnswerText(tokens, StopStrings(()), calls(syntax=syntax), markers={1, 3}, ends={4})
    said = NOTHING
    for token in (0, 2, 4, 1, 5, 2, 4, 6, 3, 2, 7):
        said = joined(said, answer.add(token))
    text, _, found = whole(joined(said, answer.finish()))
    assert text == "hibye"
    assert found == [(0, "look", '{"a": 1}')]
