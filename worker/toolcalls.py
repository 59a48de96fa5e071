"""Tool calls in the text of an answer: between a model's markers, or the whole of a forced one. IO thread only."""

import json
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from protocol.data import ToolDelta
from worker.detok import find_beginning
from worker.jobs import NOTHING, Said

#: The text between the markers and the tool definitions to one call or several; raises anything for what is none.
Parse = Callable[[str, Any], Any]

#: Parsers are regular expressions, run where everyone's tokens pass.
MAX_CALL_CHARS: Final = 256 * 1024
#: How the grammar of a forced call begins (`worker.grammar`).
_FORCED_HEAD: Final = re.compile(r'\{"name": "([^"\\]*)", "arguments": ')


class CallSyntax(NamedTuple):
    """How a model writes calls. `end` is empty where nothing ends them but the end of the answer."""

    start: str
    end: str
    parse: Parse


def parse_json_call(text: str, _tools: Any = None) -> Any:
    """Read what `GENERIC` asks models for: one JSON object with name and arguments."""
    return json.loads(text)


#: What models are told whose chat template knows no tools, or in a syntax that nothing here reads.
GENERIC: Final = CallSyntax("<tool_call>", "</tool_call>", parse_json_call)


def new_call_id() -> str:
    """Return an id as OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"


class Calls:
    """Finds calls between markers. What does not parse, or names no tool of the request, stays text.

    White space beside a call belongs to it. With `at_most` calls found the answer is done.
    """

    def __init__(self, syntax: CallSyntax, tools: Sequence[dict[str, Any]], *, parallel: bool) -> None:
        self._syntax = syntax
        self._tools = list(tools)
        self._names = {tool["function"]["name"] for tool in tools}
        self._parallel = parallel
        self._held = ""
        self._searched = 0
        self._space = ""
        self._count = 0
        self._behind_call = False
        self.in_call = False
        self.done = False

    @property
    def called(self) -> bool:
        """Whether a call was found."""
        return self._count > 0

    def add(self, text: str) -> Said:
        """Return the text that cannot be part of a call, and the calls that are complete."""
        if self.done:
            return NOTHING
        self._held += text
        shown: list[str] = []
        calls: list[ToolDelta] = []
        while self._leave_call(shown, calls) if self.in_call else self._enter_call(shown):
            pass
        return Said("".join(shown), "", calls)

    def finish(self) -> Said:
        """Return a call whose end marker never came, or else the text that was held back."""
        shown: list[str] = []
        calls: list[ToolDelta] = []
        held, self._held = self._held, ""
        if self.in_call and (not self._syntax.end or _is_json(held)):
            self.in_call = False
            self._take(held, "", shown, calls)
        elif self.in_call:
            # Some parsers make a call of the half of one; only of JSON it is certain that nothing is missing.
            self.in_call = False
            self._show(self._syntax.start + held, shown)
        elif held:
            self._show(held, shown)
        if self._space and not self._count:
            shown.append(self._space)
        self._space = ""
        return Said("".join(shown), "", calls)

    def _enter_call(self, shown: list[str]) -> bool:
        start, held = self._syntax.start, self._held
        at = held.find(start)
        cut = at if at >= 0 else find_beginning(held, start)
        self._show(held[:cut], shown)
        if at < 0:
            self._held = held[cut:]
            return False
        self._held = held[at + len(start) :]
        self._searched = 0
        self.in_call = True
        return True

    def _leave_call(self, shown: list[str], calls: list[ToolDelta]) -> bool:
        end, held = self._syntax.end, self._held
        at = held.find(end, self._searched) if end else -1
        if at < 0:
            self._searched = max(0, len(held) - len(end) + 1)
            return False
        self.in_call = False
        self._held = held[at + len(end) :]
        self._take(held[:at], end, shown, calls)
        return not self.done

    def _take(self, body: str, end: str, shown: list[str], calls: list[ToolDelta]) -> None:
        found = self._read(body)
        if found is None:
            self._show(self._syntax.start + body + end, shown)
            return
        self._space = ""
        for name, arguments in found if self._parallel else found[:1]:
            calls.append(ToolDelta(self._count, new_call_id(), name, arguments))
            self._count += 1
        self._behind_call = True
        if not self._parallel:
            self.done = True
            self._held = ""

    def _read(self, body: str) -> list[tuple[str, str]] | None:
        if len(body) > MAX_CALL_CHARS:
            return None
        try:
            parsed = self._syntax.parse(body, self._tools)
        except Exception:  # noqa: BLE001 - mlx-lm's parsers raise anything for what a model may write
            return None
        found = [_as_call(call) for call in (parsed if isinstance(parsed, list) else [parsed])]
        calls = [call for call in found if call is not None and call[0] in self._names]
        return calls if calls and len(calls) == len(found) else None

    def _show(self, text: str, shown: list[str]) -> None:
        """Show text, but not yet the white space it ends with: a call may follow."""
        if self._behind_call:
            text = text.lstrip()
            self._behind_call = not text
        visible = text.rstrip()
        if visible:
            shown += (self._space, visible)
            self._space = text[len(visible) :]
        else:
            self._space += text


class ForcedCall:
    """The one call that an answer consists of, as its grammar writes it: the name first, then the arguments grow."""

    def __init__(self) -> None:
        self._held = ""
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.called = False
        self.done = False
        self.in_call = False

    def add(self, text: str) -> Said:
        """Return the next piece of the call."""
        if self.called:
            piece = self._arguments(text)
            return Said(tool_calls=[ToolDelta(0, arguments=piece)]) if piece else NOTHING
        self._held += text
        head = _FORCED_HEAD.match(self._held)
        if head is None:
            return NOTHING
        rest, self._held = self._held[head.end() :], ""
        self.called = True
        first = ToolDelta(0, new_call_id(), head[1])
        piece = self._arguments(rest)
        return Said(tool_calls=[first, ToolDelta(0, arguments=piece)] if piece else [first])

    def finish(self) -> Said:
        """Return what was cut before the name was complete, as text."""
        held, self._held = self._held, ""
        return Said(held)

    def _arguments(self, text: str) -> str:
        """Return what of the text belongs to the arguments: all up to the bracket that closes them."""
        if self.done:
            return ""
        for index, letter in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or letter != '"'
                self._escaped = letter == "\\" and not self._escaped
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.done = True
                    return text[: index + 1]
        return text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _as_call(parsed: Any) -> tuple[str, str] | None:
    """Return name and arguments of a parsed call, or None for what cannot be one."""
    if not isinstance(parsed, dict):
        return None
    name = parsed.get("name")
    arguments = parsed.get("arguments", parsed.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    try:
        return name, json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        return None
