"""Answers of the fault worker that are more than text."""

from protocol.data import ToolDelta
from protocol.errors import LmxError
from worker.jobs import NOTHING, Answer, Said

#: What is thought of an answer that begins with thinking.
THOUGHT_TOKENS = 5


class _Around:
    """What the answers have in common: the plain answer whose text they make something else of."""

    def __init__(self, inner: Answer) -> None:
        self._inner = inner

    @property
    def stopped(self) -> bool:
        return self._inner.stopped

    @property
    def failed(self) -> LmxError | None:
        return self._inner.failed


class ThinkingAnswer(_Around):
    """Thinks for a few tokens, then says the rest."""

    def __init__(self, inner: Answer) -> None:
        super().__init__(inner)
        self._left = THOUGHT_TOKENS

    @property
    def called(self) -> bool:
        return False

    def add(self, token: int) -> Said:
        said = self._inner.add(token)
        self._left -= 1
        return Said(reasoning=said.text) if self._left >= 0 else said

    def finish(self) -> Said:
        return self._inner.finish()


class CallingAnswer(_Around):
    """Calls `count` with its text as the one argument, in as many pieces as there are tokens."""

    def __init__(self, inner: Answer) -> None:
        super().__init__(inner)
        self._begun = False

    @property
    def called(self) -> bool:
        return self._begun

    def add(self, token: int) -> Said:
        text = self._inner.add(token).text
        if not text:
            return NOTHING
        if self._begun:
            return Said(tool_calls=[ToolDelta(0, arguments=text)])
        self._begun = True
        return Said(tool_calls=[ToolDelta(0, "call_0", "count"), ToolDelta(0, arguments='{"to":"' + text)])

    def finish(self) -> Said:
        return Said(tool_calls=[ToolDelta(0, arguments=self._inner.finish().text + '"}')]) if self._begun else NOTHING
