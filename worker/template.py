"""A model's chat template: what it understands, and conversations in the form it wants. Called by any one thread."""

import contextlib
import functools
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

import jinja2
import jinja2.meta

from protocol.data import ChatMessage
from protocol.errors import LmxError
from worker.options import Wanted
from worker.toolcalls import GENERIC, CallSyntax

Turn = dict[str, Any]

_PROBE: Final = "lmx probe 7d1f"
_SWITCHES: Final = ("enable_thinking", "thinking")
#: Templates are programs of the model's author and fail in any way; their words may quote the conversation.
TEMPLATE_ERRORS: Final = (
    jinja2.TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError
)  # fmt: skip
_TOOLS_PROMPT: Final = """You may call functions to help with the request. The functions are, one JSON object a line:
{tools}
To call one, answer with nothing but this, for each call:
<tool_call>
{{"name": "the function's name", "arguments": {{its arguments as a JSON object}}}}
</tool_call>
The results come back between <tool_response> and </tool_response>. If no function helps, answer as usual."""


class ChatTemplate:
    """Wraps what an `mlx_lm` TokenizerWrapper knows about one model's conversations."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        template = getattr(tokenizer, "chat_template", None)
        source = "\n".join(template.values()) if isinstance(template, dict) else str(template or "")
        self._variables = _variables(tokenizer, source)
        self._knows_developer = "developer" in source
        self._native_tools = "tools" in self._variables and bool(tokenizer.has_tool_calling)
        self._switch = next((name for name in _SWITCHES if name in self._variables), None)

    @property
    def exists(self) -> bool:
        """Whether the model says itself how a conversation is written."""
        return bool(self._tokenizer.has_chat_template)

    @property
    def calls(self) -> CallSyntax:
        """How this model writes tool calls: as its template says, or as it is told by us."""
        tokenizer = self._tokenizer
        if not self._native_tools:
            return GENERIC
        return CallSyntax(tokenizer.tool_call_start, tokenizer.tool_call_end or "", tokenizer.tool_parser)

    def arguments(self, wanted: Wanted) -> dict[str, Any]:
        """Return the variables for the template; raise `LmxError` for what this one has no use for."""
        arguments = dict(wanted.template_args)
        switches = [arguments.pop(name) for name in _SWITCHES if name in arguments]
        for name in arguments:
            if name not in self._variables:
                words = f"This model's chat template has no variable {name[:64]!r}"
                raise LmxError("unsupported_parameter", words, param="chat_template_kwargs")
        for switch in switches:
            arguments |= self._thinking(bool(switch), "chat_template_kwargs")
        if wanted.effort:
            arguments |= self._effort(wanted.effort)
        if wanted.reasoning is not None:
            arguments |= self._thinking(wanted.reasoning, "enable_thinking")
        return arguments

    def render(self, messages: Sequence[ChatMessage], wanted: Wanted, arguments: dict[str, Any]) -> str:
        """Return the prompt; raise `LmxError` if the template accepts the messages in no form there is."""
        if not self.exists:
            lines = [f"{turn['role']}: {turn['content']}" for turn in _as_plain(messages, wanted.tools)]
            return "\n".join([*lines, "assistant:"])
        native = self._native_tools
        if native and wanted.tools:
            arguments = arguments | {"tools": list(wanted.tools)}
        first: Exception | None = None
        for turns in self._forms(messages, wanted, native=native):
            try:
                return str(self._apply(turns, **arguments))
            except TEMPLATE_ERRORS as error:
                first = first or error
        msg = "The model's chat template does not accept these messages: check the roles and their order"
        raise LmxError("invalid_value", msg, param="messages") from first

    def _forms(self, messages: Sequence[ChatMessage], wanted: Wanted, *, native: bool) -> Iterator[list[Turn]]:
        """Yield the turns as given, and then in forms that pickier templates accept."""
        turns = [_native_turn(message) for message in messages] if native else _as_plain(messages, wanted.tools)
        if not self._knows_developer:
            for turn in turns:
                turn["role"] = "system" if turn["role"] == "developer" else turn["role"]
        if self._shows_system:
            yield turns
            if native and any("tool_calls" in turn for turn in turns):
                yield [_with_text_arguments(turn) for turn in turns]
        if any(turn["role"] == "system" for turn in turns):
            if self._shows_system:
                yield _system_first(turns)
            yield _system_in_user(turns)
        elif not self._shows_system:
            yield turns

    def _apply(self, turns: list[Turn], **arguments: Any) -> Any:
        return self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **arguments)

    @functools.cached_property
    def _shows_system(self) -> bool:
        """Return whether a system message is shown: some templates refuse it, some drop it in silence."""
        turns = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "hi"}]
        with contextlib.suppress(*TEMPLATE_ERRORS):
            return _PROBE in self._apply(turns)
        return False

    def _thinking(self, on: bool, param: str) -> dict[str, Any]:
        if self._switch is not None:
            return {self._switch: on}
        if on == bool(self._tokenizer.has_thinking):
            return {}
        words = "cannot be kept from thinking" if not on else "does not think before it answers"
        raise LmxError("unsupported_parameter", f"This model {words}", param=param)

    def _effort(self, effort: str) -> dict[str, Any]:
        on = effort != "none"
        if "reasoning_effort" in self._variables:
            switch = {self._switch: on} if self._switch is not None else {}
            return {"reasoning_effort": effort} | switch
        return self._thinking(on, "reasoning_effort")


def _variables(tokenizer: Any, source: str) -> frozenset[str]:
    """Return the variables that a template reads."""
    render = getattr(tokenizer, "_chat_template", None)
    if callable(render):  # mlx-lm has a function for some models
        return frozenset(inspect.signature(render).parameters)
    try:
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)
        return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
    except jinja2.TemplateError:  # tags that transformers adds
        return frozenset(re.findall(r"[A-Za-z_]\w*", source))


def _native_turn(message: ChatMessage) -> Turn:
    turn: Turn = {"role": message.role, "content": message.content}
    if message.name is not None:
        turn["name"] = message.name
    if message.reasoning is not None:
        turn["reasoning_content"] = message.reasoning
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
    return turn


def _arguments(text: str) -> Any:
    """Return arguments as most templates want them, as an object; what is none stays text."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return parsed if isinstance(parsed, dict) else text


def _with_text_arguments(turn: Turn) -> Turn:
    calls = [
        call | {"function": call["function"] | {"arguments": _as_text(call["function"]["arguments"])}}
        for call in turn.get("tool_calls", ())
    ]
    return turn | {"tool_calls": calls} if calls else turn


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _as_plain(messages: Sequence[ChatMessage], tools: Sequence[dict[str, Any]]) -> list[Turn]:
    """Return turns of text alone: tools told to the system, calls and results in the syntax told there."""
    turns: list[Turn] = []
    for message in messages:
        if message.role == "tool":
            result = f"<tool_response>\n{message.content}\n</tool_response>"
            if turns and turns[-1].get("results"):
                turns[-1]["content"] += f"\n{result}"
            else:
                turns.append({"role": "user", "content": result, "results": True})
            continue
        turn = _native_turn(message)
        turn.pop("tool_call_id", None)
        calls = turn.pop("tool_calls", ())
        written = [
            "<tool_call>\n" + json.dumps(call["function"], ensure_ascii=False) + "\n</tool_call>" for call in calls
        ]
        turn["content"] = "\n".join([*([turn["content"]] if turn["content"] or not calls else []), *written])
        turns.append(turn)
    for turn in turns:
        turn.pop("results", None)
    if tools:
        told = _TOOLS_PROMPT.format(tools="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools))
        if turns and turns[0]["role"] in {"system", "developer"}:
            turns[0]["content"] += f"\n\n{told}"
        else:
            turns.insert(0, {"role": "system", "content": told})
    return turns


def _system_first(turns: list[Turn]) -> list[Turn]:
    """Return the turns with all system messages as one at the start."""
    told = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system")
    return [{"role": "system", "content": told}, *(turn for turn in turns if turn["role"] != "system")]


def _system_in_user(turns: list[Turn]) -> list[Turn]:
    """Return the turns with the system messages in front of what the user says first."""
    system, *others = _system_first(turns)
    for index, turn in enumerate(others):
        if turn["role"] == "user":
            others[index] = turn | {"content": f"{system['content']}\n\n{turn['content']}"}
            return others
    return [{"role": "user", "content": system["content"]}, *others]
