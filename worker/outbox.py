"""What one gateway has not taken yet: bounded by merging, not by queueing."""

from typing import Final

import msgspec

from protocol.data import Accepted, Delta, Failed, Finish, Refused, Step, Usage
from worker.requests import Reply

#: Unsent bytes of one answer after which it is given up.
MAX_UNSENT_BYTES: Final = 1024 * 1024
#: Unsent refusals and the like after which the gateway counts as gone.
MAX_UNSENT_MESSAGES: Final = 4096
#: A token id on the wire takes up to this many bytes.
_TOKEN_BYTES: Final = 5


class OutboxFullError(Exception):
    """The gateway sends and does not read; it is of no use to anyone."""


class _Unsent(msgspec.Struct):
    """The deltas of one request, as one."""

    step: int
    text: list[str]
    token_ids: list[int]
    size: int = 0
    finish: Finish | None = None
    usage: Usage | None = None


class Outbox:
    """Messages for one gateway while its pipe is full.

    The order that matters is kept: of one request, the acceptance before the text and the text before a failure.
    """

    def __init__(self) -> None:
        self._first: list[Accepted | Refused] = []
        self._deltas: dict[int, _Unsent] = {}
        self._last: list[Failed] = []

    def __bool__(self) -> bool:
        return bool(self._first or self._deltas or self._last)

    def add(self, message: Reply) -> list[int]:
        """Keep a message; return the rids with too much unsent, whose text is thereby forgotten."""
        match message:
            case Step():
                return [delta.rid for delta in message.deltas if not self._merge(message.step, delta)]
            case Failed():
                self._last.append(message)
            case _:
                self._first.append(message)
        if len(self._first) + len(self._last) > MAX_UNSENT_MESSAGES:
            raise OutboxFullError
        return []

    def forget(self, rid: int) -> None:
        """Drop the unsent text of a request that was aborted."""
        self._deltas.pop(rid, None)

    def head(self, incarnation: int) -> Reply:
        """Return the message to send next; the outbox must not be empty."""
        if self._first:
            return self._first[0]
        if self._deltas:
            rid, unsent = next(iter(self._deltas.items()))
            delta = Delta(rid, "".join(unsent.text), unsent.token_ids, unsent.finish, unsent.usage)
            return Step(incarnation, unsent.step, [delta])
        return self._last[0]

    def pop(self) -> None:
        """Remove what `head` returned."""
        if self._first:
            self._first.pop(0)
        elif self._deltas:
            del self._deltas[next(iter(self._deltas))]
        else:
            self._last.pop(0)

    def _merge(self, step: int, delta: Delta) -> bool:
        unsent = self._deltas.get(delta.rid)
        if unsent is None:
            unsent = self._deltas[delta.rid] = _Unsent(step, [], [])
        unsent.step = step
        unsent.text.append(delta.text)
        unsent.token_ids += delta.token_ids
        unsent.size += len(delta.text.encode()) + _TOKEN_BYTES * len(delta.token_ids)
        unsent.finish = delta.finish
        unsent.usage = delta.usage
        if unsent.size <= MAX_UNSENT_BYTES:
            return True
        del self._deltas[delta.rid]
        return False
