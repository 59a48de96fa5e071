"""One request to a model: what its workers said so far, for the single task that answers the client.

The link calls `accept`, `add` and `fail` as frames arrive; the HTTP handler waits for the bell and takes. Between them
is a slot that merges, not a queue: however slow the client, a request is one text and a few flags. It outlives the
process that works on it: with the tokens it has, the next process goes on.
"""

import secrets
import time
from collections.abc import Callable
from enum import Enum, auto
from functools import cached_property
from typing import Final, Protocol

import msgspec

from gateway.bell import Bell
from gateway.quarantine import digest_of
from protocol.data import (
    Delta,
    Embedded,
    Finish,
    Kind,
    Ranked,
    Resume,
    Submit,
    Tokenized,
    TokenLogprob,
    ToolDelta,
    Usage,
)
from protocol.errors import LmxError

_EPOCH_BITS: Final = 31
_COUNTER_BITS: Final = 32
#: A worker gets at least this long, so that it and not we name the reason for being late.
_MIN_DEADLINE_S: Final = 0.001
#: What a logprob and a piece of a tool call hold besides their texts, roughly.
_LOGPROB_BYTES: Final = 32
_TOOL_BYTES: Final = 64


class Rids:
    """Request ids, unique over restarts of the gateway: a random epoch in front of a counter. Fits a signed int64."""

    def __init__(self) -> None:
        self._next = secrets.randbits(_EPOCH_BITS) << _COUNTER_BITS

    def new(self) -> int:
        """Return an id that no other request has."""
        self._next += 1
        return self._next


class RequestState(Enum):
    """Where a request is; a process that ends sends it back to the beginning."""

    WAITING = auto()
    SUBMITTED = auto()
    ACCEPTED = auto()
    STREAMING = auto()
    FINISHED = auto()
    FAILED = auto()


_STREAMING: Final = RequestState.STREAMING


class RequestOwner(Protocol):
    """Who is told of the turns in a request's life; called while frames are being read."""

    def on_end(self, request: "Request") -> None:
        """It has ended, one way or the other. Called once."""

    def on_mark(self, request: "Request") -> None:
        """It has `mark` tokens."""


class Extras(msgspec.Struct):
    """What an answer gained besides text. The order between the kinds does not matter to any client."""

    reasoning: list[str] = []
    tool_calls: list[ToolDelta] = []
    logprobs: list[TokenLogprob] = []


class Request:
    """A request of one client. `submit` is what every process is asked for; `deadline_at` is of `time.monotonic`.

    `bell` wakes the task that answers the client. `limit` bounds the bytes that wait here. A stream (`streams`) may
    exceed it while its task is merely about to run, not while the bell is `blocked`. A whole answer is only taken at
    its end. `continues` says whether it goes on in the next process if its own ends.
    """

    def __init__(
        self,
        model: str,
        submit: Submit,
        bell: "Bell[Request]",
        *,
        limit: int,
        streams: bool,
        continues: bool,
        deadline_at: float,
    ) -> None:
        self.model = model
        self.rid = submit.rid
        self.continues = continues
        self.state = RequestState.WAITING
        #: Whether the worker has nothing more to say, or is not asked any more.
        self.ended = False
        #: Whether some process has ever taken it.
        self.accepted = False
        #: Crashes it was a suspect of.
        self.crashes = 0
        self.error: LmxError | None = None
        self.finish: Finish | None = None
        self.usage: Usage | None = None
        #: The answer to what is answered with one message.
        self.result: Embedded | Ranked | Tokenized | None = None
        self.prompt_tokens = 0
        self.cached_tokens = 0
        #: The process it was last sent to.
        self.incarnation: int | None = None
        #: All of the answer so far, in whichever process: never more than its max_tokens.
        self.tokens: list[int] = []
        #: The number of tokens of which the owner wants to know.
        self.mark: int | None = None
        self.owner: RequestOwner | None = None
        #: `time.monotonic()` of the moment when a process first took it, and of the first text.
        self.accepted_at: float | None = None
        self.first_text_at: float | None = None
        self.rung = False
        #: Writes text to the client at once and returns True, if nothing is on its way that comes before.
        self.direct: Callable[[str], bool] | None = None
        #: What `take_extras` would return.
        self.extras: Extras | None = None
        self._submit = submit
        self._coming = submit.coming
        self._bell = bell
        self._deadline_at = deadline_at
        self._streams = streams
        self._limit = limit
        self._texts: list[str] = []
        self._unsent = 0

    # -- what the desk does with it -----------------------------------------------------------------------------

    @cached_property
    def digest(self) -> bytes:
        """What identifies the request should it end its process. Made on demand: few ever are in a crash."""
        return digest_of(self.model, self._submit)

    @property
    def kind(self) -> Kind:
        """What it asks for."""
        return self._submit.kind

    @property
    def trace(self) -> str:
        """The id the client knows."""
        return self._submit.trace

    @property
    def scored(self) -> bool:
        """Whether its tokens come with log probabilities."""
        return self._submit.sampling.logprobs is not None

    @property
    def priority(self) -> int:
        """How urgent it is; higher goes first."""
        return self._submit.priority

    @property
    def in_flight(self) -> bool:
        """Whether a process has taken it and not ended it."""
        return self.state is RequestState.ACCEPTED or self.state is RequestState.STREAMING

    def message(self, incarnation: int) -> Submit:
        """Return what to send to a process: the whole request, and what it was answered with so far."""
        submit = self._submit
        self.incarnation = incarnation
        coming, self._coming = self._coming, 0  # they come now, not when it is asked once more
        return Submit(
            incarnation=incarnation,
            rid=submit.rid,
            kind=submit.kind,
            messages=submit.messages,
            sampling=submit.sampling,
            deadline_s=max(self._deadline_at - time.monotonic(), _MIN_DEADLINE_S),
            trace=submit.trace,
            client=submit.client,
            priority=submit.priority,
            resume=Resume(self.tokens) if self.tokens else None,
            options=submit.options,
            inputs=submit.inputs,
            echo=submit.echo,
            group=submit.group,
            dimensions=submit.dimensions,
            traceparent=submit.traceparent,
            salt=submit.salt,
            coming=coming,
        )

    def submitted(self) -> None:
        """It has been sent to a process."""
        self.state = RequestState.SUBMITTED

    def wait(self) -> None:
        """Nobody works on it now."""
        self.state = RequestState.WAITING
        self.mark = None
        self.wake()

    # -- what the link reports ----------------------------------------------------------------------------------

    def accept(self, prompt_tokens: int, cached_tokens: int) -> bool:
        """The worker has taken the request. Return False if that makes no sense now."""
        if self.state is not RequestState.SUBMITTED:
            return False
        self.state = RequestState.ACCEPTED
        self.accepted = True
        if self.accepted_at is None:
            self.accepted_at = time.monotonic()
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = cached_tokens
        self.wake()
        return True

    def add(self, delta: Delta, *, more: bool = False) -> bool:
        """Merge what one step brought. Return False if that makes no sense now.

        Text that goes on, and nothing else, is written at once, unless `more` comes that can be written with it:
        ringing the bell for it costs as much as the writing.
        """
        # This runs once per token, and to hash an enum's member or find it by name is slow.
        goes_on = self.state is _STREAMING
        if not goes_on and self.state is not RequestState.ACCEPTED:
            return False
        self.tokens += delta.token_ids
        text = delta.text
        if (
            self.direct is not None
            and not more
            and goes_on
            and text
            and delta.finish is None
            and self.mark is None
            and not (delta.logprobs or delta.reasoning or delta.tool_calls)
            and self.direct(text)
        ):
            return True
        if text:
            self.state = _STREAMING
            if self.first_text_at is None:
                self.first_text_at = time.monotonic()
            self._texts.append(text)
            self._unsent += len(text) if text.isascii() else len(text.encode())
        if delta.logprobs or delta.reasoning or delta.tool_calls:
            self._add_extras(delta)
        if delta.finish is not None:
            self.finish = delta.finish
            self.usage = delta.usage
            self._end(RequestState.FINISHED)
        elif self._unsent > self._limit and self._bell.blocked:
            self._overflow()
        elif self.mark is not None and len(self.tokens) >= self.mark:
            self.mark = None
            if self.owner is not None:
                self.owner.on_mark(self)
        if self._streams or self.ended:
            self.wake()
        return True

    def complete(self, result: Embedded | Ranked | Tokenized) -> bool:
        """Take an answer that is one message. Return False if that makes no sense now."""
        if self.state is not RequestState.SUBMITTED and self.state is not RequestState.ACCEPTED:
            return False
        self.result = result
        self._end(RequestState.FINISHED)
        self.wake()
        return True

    def fail(self, error: LmxError) -> None:
        """End without an answer. The first end counts."""
        if self.ended:
            return
        self.error = error
        self._end(RequestState.FAILED)
        self.wake()

    def _end(self, state: RequestState) -> None:
        self.state = state
        self.ended = True
        if self.owner is not None:
            self.owner.on_end(self)

    def _add_extras(self, delta: Delta) -> None:
        self.state = RequestState.STREAMING
        if self.first_text_at is None:
            self.first_text_at = time.monotonic()
        if self.extras is None:
            self.extras = Extras()
        extras = self.extras
        if delta.reasoning:
            extras.reasoning.append(delta.reasoning)
            self._unsent += len(delta.reasoning.encode())
        for call in delta.tool_calls:
            extras.tool_calls.append(call)
            self._unsent += _TOOL_BYTES + len(call.arguments.encode())
        for logprob in delta.logprobs:
            extras.logprobs.append(logprob)
            self._unsent += _LOGPROB_BYTES * (1 + len(logprob.top))

    # -- what the handler does ----------------------------------------------------------------------------------

    def wake(self) -> None:
        """Tell the handler that there is something new."""
        self._bell.ring(self)

    def take(self) -> str:
        """Return the text that has arrived since the last call, and forget it."""
        text = self._texts[0] if len(self._texts) == 1 else "".join(self._texts)
        self._texts.clear()
        self._unsent = 0
        return text

    def take_extras(self) -> Extras:
        """Return what else has arrived since the last call, and forget it."""
        extras, self.extras = self.extras, None
        return Extras() if extras is None else extras

    def _overflow(self) -> None:
        self._texts.clear()
        self.extras = None
        if not self._streams:
            self.fail(LmxError("protocol_error", f"The answer is longer than {self._limit} bytes."))
            return
        self._end(RequestState.FAILED)
        self._bell.leave()
        if self._bell.on_overflow is not None:
            self._bell.on_overflow()
