"""Tells what a model thought from what it answered. IO thread only."""

from typing import Final

from worker.detok import find_beginning
from worker.jobs import NOTHING, Said
from worker.splitting import Splitter, joined

_BEFORE: Final = 0
_THINKING: Final = 1
_BETWEEN: Final = 2
_ANSWERING: Final = 3


class Reasoning:
    """Takes out the block between two markers that an answer may begin with; `then` gets the rest.

    `is_open` says that the prompt ends with the first marker. White space around the block belongs to neither side.
    Later markers are text: an answer may speak of them.
    """

    def __init__(self, start: str, end: str, then: Splitter, *, is_open: bool) -> None:
        self._start = start
        self._end = end
        self._then = then
        self._state = _THINKING if is_open else _BEFORE
        self._held = ""
        self._begun = False

    @property
    def in_call(self) -> bool:
        """Whether a tool call is being written."""
        return self._state == _ANSWERING and self._then.in_call

    @property
    def called(self) -> bool:
        """Whether there was a tool call."""
        return self._then.called

    @property
    def done(self) -> bool:
        """Whether nothing may come any more."""
        return self._then.done

    def add(self, text: str) -> Said:
        """Return what is certain."""
        if self._state == _ANSWERING:
            return self._then.add(text)
        held, self._held = self._held + text, ""
        if self._state == _BEFORE:
            seen = held.lstrip()
            if self._start.startswith(seen):
                if seen != self._start:
                    self._held = held
                    return NOTHING
            elif not seen.startswith(self._start):
                self._state = _ANSWERING
                return self._then.add(held)
            self._state = _THINKING
            held = seen[len(self._start) :]
        thought = ""
        if self._state == _THINKING:
            if not self._begun:
                held = held.lstrip()
            at = held.find(self._end)
            if at < 0:
                at = find_beginning(held, self._end)
                self._held = held[at:]
                self._begun |= at > 0
                return Said(reasoning=held[:at])
            thought, held = held[:at], held[at + len(self._end) :]
            self._state = _BETWEEN
        held = held.lstrip()
        if not held:
            return Said(reasoning=thought)
        self._state = _ANSWERING
        return joined(Said(reasoning=thought), self._then.add(held))

    def finish(self) -> Said:
        """Return what was held back."""
        held, self._held = self._held, ""
        if self._state == _THINKING:
            return joined(Said(reasoning=held), self._then.finish())
        return joined(self._then.add(held) if held else NOTHING, self._then.finish())
