"""The visible text of an answer, split into what it is made of. IO thread only."""

from typing import Protocol

from worker.jobs import Said


class Splitter(Protocol):
    """Takes text in pieces and tells what it is. The pieces together do not depend on where the text was cut."""

    @property
    def in_call(self) -> bool:
        """Whether a tool call is being written: special tokens are part of its syntax then."""

    @property
    def called(self) -> bool:
        """Whether there was a tool call."""

    @property
    def done(self) -> bool:
        """Whether nothing may come any more."""

    def add(self, text: str) -> Said:
        """Return what is certain."""

    def finish(self) -> Said:
        """Return what was held back, at the end of the text."""


class Plain:
    """Text is text."""

    in_call = False
    called = False
    done = False

    def add(self, text: str) -> Said:
        """Return it."""
        return Said(text)

    def finish(self) -> Said:
        """Nothing was held back."""
        return Said()


def joined(first: Said, then: Said) -> Said:
    """Return both, one after the other."""
    return Said(first.text + then.text, first.reasoning + then.reasoning, [*first.tool_calls, *then.tool_calls])
