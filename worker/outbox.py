"""What one gateway has not taken yet: bounded by merging, not by queueing."""

from typing import Final

import msgspec

from protocol.data import (
    Accepted,
    Delta,
    Embedded,
    Failed,
    Finish,
    Ranked,
    Refused,
    Step,
    Tokenized,
    TokenLogprob,
    ToolDelta,
    Usage,
)
from worker.requests import Reply

#: Unsent bytes of one answer after which it is given up.
MAX_UNSENT_BYTES: Final = 1024 * 1024
#: Unsent refusals and the like after which the gateway counts as gone.
MAX_UNSENT_MESSAGES: Final = 4096
#: A token id on the wire takes up to this many bytes, and so do the numbers around a text.
_TOKEN_BYTES: Final = 5
_LOGPROB_BYTES: Final = 32


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
    reasoning: list[str] = []
    tool_calls: list[ToolDelta] = []
    logprobs: list[TokenLogprob] = []

    def delta(self, rid: int) -> Delta:
        """Return them merged."""
        return Delta(
            rid,
            "".join(self.text),
            self.token_ids,
            self.finish,
            self.usage,
            "".join(self.reasoning),
            self.tool_calls,
            self.logprobs,
        )

    def add(self, delta: Delta) -> None:
        """Take one more."""
        self.text.append(delta.text)
        self.token_ids += delta.token_ids
        self.finish = delta.finish
        self.usage = delta.usage
        self.size += len(delta.text.encode()) + _TOKEN_BYTES * len(delta.token_ids)
        if delta.reasoning:
            self.reasoning.append(delta.reasoning)
            self.size += len(delta.reasoning.encode())
        for call in delta.tool_calls:
            self.tool_calls.append(call)
            self.size += len(call.arguments.encode()) + len(call.id) + len(call.name.encode()) + _TOKEN_BYTES
        if delta.logprobs:
            self.logprobs += delta.logprobs
            # Those of an echoed prompt come once and have a bound of their own: `worker.completions`.
            for logprob in delta.logprobs[-len(delta.token_ids) :] if delta.token_ids else ():
                self.size += _LOGPROB_BYTES * (1 + len(logprob.top))


class Outbox:
    """Messages for one gateway while its pipe is full.

    The order that matters is kept: of one request, the acceptance before the text and the text before a failure.
    """

    def __init__(self) -> None:
        self._first: list[Accepted | Refused | Embedded | Ranked | Tokenized] = []
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
            return Step(incarnation, unsent.step, [unsent.delta(rid)])
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
        unsent.add(delta)
        if unsent.size <= MAX_UNSENT_BYTES:
            return True
        del self._deltas[delta.rid]
        return False
