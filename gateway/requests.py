"""One generation request: what its worker said so far, and the single task that waits for more.

The link calls `accept`, `add` and `fail` as frames arrive; the HTTP handler awaits `changed` and takes. Between them is
a slot that merges, not a queue: however slow the client, a request is one text and a few flags.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from enum import Enum, auto
from typing import Final

from protocol.data import Delta, Finish, Usage
from protocol.errors import LmxError

_EPOCH_BITS: Final = 31
_COUNTER_BITS: Final = 32


class Rids:
    """Request ids, unique over restarts of the gateway: a random epoch in front of a counter. Fits a signed int64."""

    def __init__(self) -> None:
        self._next = secrets.randbits(_EPOCH_BITS) << _COUNTER_BITS

    def new(self) -> int:
        """Return an id that no other request has."""
        self._next += 1
        return self._next


class RequestState(Enum):
    """Where a request is; it only ever moves down this list."""

    SUBMITTED = auto()
    ACCEPTED = auto()
    STREAMING = auto()
    FINISHED = auto()
    FAILED = auto()


class Request:
    """A request in the hands of one worker.

    `limit` bounds the bytes of text that wait here. A stream (`streams`) may exceed it while its task is merely about
    to run; `blocked` says that the task is stuck in a write to the client. A whole answer is only taken at its end.
    """

    def __init__(self, rid: int, limit: int, *, streams: bool) -> None:
        self.rid = rid
        self.state = RequestState.SUBMITTED
        #: Whether the worker has nothing more to say, or is not asked any more.
        self.ended = False
        self.error: LmxError | None = None
        self.finish: Finish | None = None
        self.usage: Usage | None = None
        self.prompt_tokens = 0
        self.cached_tokens = 0
        #: `time.monotonic()` of the first text.
        self.first_text_at: float | None = None
        self.client_gone = False
        self.blocked = not streams
        #: Called once when the limit is exceeded.
        self.on_overflow: Callable[[], None] | None = None
        self._streams = streams
        self._limit = limit
        self._texts: list[str] = []
        self._unsent = 0
        self._dirty = False
        self._waiter: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()

    # -- what the link reports ----------------------------------------------------------------------------------

    def accept(self, prompt_tokens: int, cached_tokens: int) -> bool:
        """The worker has taken the request. Return False if that makes no sense now."""
        if self.state is not RequestState.SUBMITTED:
            return False
        self.state = RequestState.ACCEPTED
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = cached_tokens
        self.wake()
        return True

    def add(self, delta: Delta) -> bool:
        """Merge what one step brought. Return False if that makes no sense now."""
        # Compared one by one: this runs once per token, and hashing an enum's member is slow.
        if self.state is not RequestState.STREAMING and self.state is not RequestState.ACCEPTED:
            return False
        text = delta.text
        if text:
            self.state = RequestState.STREAMING
            if self.first_text_at is None:
                self.first_text_at = time.monotonic()
            self._texts.append(text)
            self._unsent += len(text) if text.isascii() else len(text.encode())
        if delta.finish is not None:
            self.state = RequestState.FINISHED
            self.ended = True
            self.finish = delta.finish
            self.usage = delta.usage
        elif self._unsent > self._limit and self.blocked:
            self._overflow()
        if self._streams or self.ended:
            self.wake()
        return True

    def fail(self, error: LmxError) -> None:
        """End without an answer. The first end counts."""
        if self.ended:
            return
        self.state = RequestState.FAILED
        self.ended = True
        self.error = error
        self.wake()

    # -- what the handler does ----------------------------------------------------------------------------------

    def leave(self) -> None:
        """The client has closed its connection."""
        self.client_gone = True
        self.wake()

    def wake(self) -> None:
        """Let `changed` return."""
        self._dirty = True
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def changed(self) -> None:
        """Wait until something happened since the last call returned. For one task only."""
        if not self._dirty:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._dirty = False

    def take(self) -> str:
        """Return the text that has arrived since the last call, and forget it."""
        text = self._texts[0] if len(self._texts) == 1 else "".join(self._texts)
        self._texts.clear()
        self._unsent = 0
        return text

    def _overflow(self) -> None:
        self._texts.clear()
        if not self._streams:
            self.fail(LmxError("protocol_error", f"The answer is longer than {self._limit} bytes."))
            return
        self.state = RequestState.FAILED
        self.ended = True
        self.leave()
        if self.on_overflow is not None:
            self.on_overflow()
