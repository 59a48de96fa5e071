"""Tokens to text, one at a time: never half a character, never a stop string, never a special token.

Tokenizers do not decode token by token (a character may span tokens, a leading space may depend on the neighbour),
so the text of a token is what it adds to the text of the tokens before it, over a window that is as short as that
allows. The pieces together are exactly the decoded whole.
"""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Final

from protocol.errors import LmxError
from worker.jobs import NOTHING, Constraint, Said
from worker.splitting import Splitter, joined

Decode = Callable[[list[int]], str]

_INCOMPLETE: Final = "\ufffd"
#: Tokens that may wait for the rest of a character. A character has at most 4 bytes; more is not UTF-8 at all.
_MAX_HELD: Final = 16


class TokenText:
    """Decodes the tokens of one answer incrementally."""

    def __init__(self, decode: Decode, special: AbstractSet[int]) -> None:
        self._decode = decode
        self._special = special
        #: The tokens shown last, and then those not shown yet.
        self._window: list[int] = []
        self._shown = 0
        self._shown_text = ""

    def add(self, token: int, *, shown: bool = False) -> str:
        """Return the text this token completes, maybe none yet. `shown` is for a special token that is wanted."""
        # Special tokens are left out here and not by the decoder: a window of nothing but them would decode to
        # nothing, and the next token would lose its leading space as if it began the text.
        if token in self._special and not shown:
            return ""
        window = self._window
        window.append(token)
        text = self._decode(window)
        held = len(window) - self._shown
        if text.endswith(_INCOMPLETE) and held < _MAX_HELD:
            return ""
        piece = text[len(self._shown_text) :]
        del window[: self._shown]
        self._shown = len(window)
        self._shown_text = self._decode(window)
        return piece


class StopStrings:
    """Finds the first of some strings in a text that arrives in pieces, and lets nothing of it out.

    The first is the one that is complete first; of two that are complete at once, the longer. That is the only rule
    under which the answer does not depend on where the text was cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.hit = False

    def add(self, text: str) -> str:
        """Return what may be shown: all that cannot be part of a stop string any more."""
        if not self._stops or self.hit:
            return "" if self.hit else text
        buffer = self._held + text
        starts = [(at + len(stop), at) for stop in self._stops if (at := buffer.find(stop)) >= 0]
        if starts:
            self.hit = True
            self._held = ""
            return buffer[: min(starts)[1]]
        cut = min(find_beginning(buffer, stop) for stop in self._stops)
        self._held = buffer[cut:]
        return buffer[:cut]

    def finish(self) -> str:
        """Return what was held back in vain."""
        held, self._held = self._held, ""
        return held


def find_beginning(buffer: str, stop: str) -> int:
    """Return where the longest end of `buffer` that `stop` begins with starts, or its length."""
    at = buffer.find(stop[0], max(0, len(buffer) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(buffer[at:]):
            return at
        at = buffer.find(stop[0], at + 1)
    return len(buffer)


class AnswerText:
    """One answer: tokens in, what may be shown out. `worker.jobs.Answer`.

    The way is tokens, text, stop strings, then `splitter`, which tells thoughts and tool calls from text; without one
    all is text. `markers` are special tokens that the splitter has to see; inside a tool call it sees all but `ends`.
    """

    __slots__ = ("_constraint", "_ends", "_markers", "_splitter", "_stops", "_tokens")

    def __init__(
        self,
        tokens: TokenText,
        stops: StopStrings,
        splitter: Splitter | None = None,
        *,
        markers: AbstractSet[int] = frozenset(),
        ends: AbstractSet[int] = frozenset(),
        constraint: Constraint | None = None,
    ) -> None:
        self._tokens = tokens
        self._stops = stops
        self._splitter = splitter
        self._markers = markers
        self._ends = ends
        self._constraint = constraint

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met, or the only call wanted is complete; nothing comes after it."""
        return self._stops.hit or (self._splitter is not None and self._splitter.done)

    @property
    def called(self) -> bool:
        """Whether the answer is, or ends with, tool calls."""
        return self._splitter is not None and self._splitter.called

    @property
    def failed(self) -> LmxError | None:
        """Why the answer cannot be gone on with: its grammar became too complex on the way."""
        return None if self._constraint is None else self._constraint.failed

    def add(self, token: int) -> Said:
        """Return what is now certain."""
        splitter = self._splitter
        if splitter is None:
            text = self._tokens.add(token)
            return Said(self._stops.add(text)) if text else NOTHING
        if self.stopped:
            return NOTHING
        shown = token in self._markers or (splitter.in_call and token not in self._ends)
        text = self._stops.add(self._tokens.add(token, shown=shown))
        said = splitter.add(text) if text else NOTHING
        return joined(said, splitter.finish()) if self._stops.hit else said

    def finish(self) -> Said:
        """Return what was held back for a stop string or a marker; half a character at the very end is dropped."""
        held = self._stops.finish()
        splitter = self._splitter
        if splitter is None:
            return Said(held)
        return joined(splitter.add(held) if held else NOTHING, splitter.finish())
