"""One incarnation of one worker, as the gateway sees it: the requests it works on and what it says about them."""

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol

from gateway.link import DataPlane
from gateway.numbers import ModelNumbers
from gateway.requests import Request, RequestState
from protocol.data import (
    HIGH_WATER_MARK,
    MAX_FRAME_BYTES,
    Abort,
    Accepted,
    Embedded,
    Failed,
    Ranked,
    Refused,
    Step,
    Tokenized,
    from_worker_decoder,
)
from protocol.errors import LmxError, from_peer
from protocol.logs import event
from protocol.messages import MalformedMessageError, encode

#: A worker whose frames make no sense this often is not listened to any more.
_MAX_PROTOCOL_ERRORS: Final = 3
_LOG_EVERY_S: Final = 1.0
_ABORT_RETRY_S: Final = 0.05
#: The process behind a link that was replaced is gone for the supervisor; the link says so within milliseconds.
_FAREWELL_S: Final = 2.0
_CRASHED: Final = "worker_crashed"
_REPLACED: Final = "model_restarting"
_BUSY: Final = "server_busy"
#: Compared once per token: to find it by its name each time is slow.
_FAILED: Final = RequestState.FAILED
ENDED_WORDS: Final = "The process of the model ended before the answer did."
#: What the clients of a worker that is lost are told, by the code of the error.
_ENDED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "worker_crashed": ENDED_WORDS,
        "protocol_error": "The process of the model sent something unreadable.",
    }
)


class PeerOwner(Protocol):
    """Who is told what becomes of a worker and of its requests."""

    def on_connected(self) -> None:
        """The worker has answered the handshake."""

    def on_returned(self, peer: "WorkerPeer", request: Request, error: LmxError) -> None:
        """The worker gives a request back before its end; the next incarnation may take it, or this one later."""

    def on_lost(self, peer: "WorkerPeer", requests: list[Request], *, crashed: bool) -> None:
        """The worker is gone and these were its requests. Not `crashed`: it was replaced."""

    def on_misbehaved(self, peer: "WorkerPeer") -> None:
        """What it sends makes no sense; it has been cut off."""

    def on_idle(self, peer: "WorkerPeer") -> None:
        """Its last request has ended, or it is dead."""


class WorkerPeer:
    """A worker incarnation behind its own link. Once `dead`, it stays so; the same worker then needs a new peer.

    `slots` is how many requests the worker runs at once.
    """

    def __init__(
        self,
        plane: DataPlane,
        model: str,
        incarnation: int,
        endpoint: str,
        *,
        slots: int,
        owner: PeerOwner,
        numbers: ModelNumbers | None = None,
    ) -> None:
        self.model = model
        self.incarnation = incarnation
        self.slots = slots
        self.dead = False
        self.connected = False
        #: Frames that were thrown away.
        self.dropped = 0
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._decoder = from_worker_decoder()
        self._requests: dict[int, Request] = {}
        self._aborts: deque[int] = deque(maxlen=HIGH_WATER_MARK)
        self._abort_timer: asyncio.Handle | None = None
        self._farewell_timer: asyncio.Handle | None = None
        self._protocol_errors = 0
        self._numbers = numbers
        self._stepped_at = 0.0
        self._logged_at = float("-inf")
        self._link = plane.connect(endpoint, self)

    @property
    def open_requests(self) -> int:
        """How many requests the worker has not ended."""
        return len(self._requests)

    @property
    def running(self) -> int:
        """How many of them it works on; the others wait for a slot."""
        return sum(request.in_flight for request in self._requests.values())

    @property
    def takes_requests(self) -> bool:
        """Whether something can be submitted now."""
        return self.connected and not self.dead

    def submit(self, request: Request) -> bool:
        """Hand a request to the worker; return False if the worker turns out to be gone. Raises `LmxError`."""
        body = encode(request.message(self.incarnation))
        if len(body) > MAX_FRAME_BYTES:
            raise LmxError("body_too_large", "The request is too large for its model's process.")
        if not self._link.send(body):
            if self.dead:
                return False
            raise LmxError("server_busy", f"The process of model '{self.model}' takes no more requests.")
        request.submitted()
        self._requests[request.rid] = request
        return True

    def release(self, request: Request) -> None:
        """Forget a request; the worker is told if it still works on it."""
        if self._requests.pop(request.rid, None) is None:
            return
        self._aborts.append(request.rid)
        if self._abort_timer is None:
            # Everyone who leaves in this turn of the loop fits into one frame.
            self._abort_timer = self._loop.call_soon(self._send_aborts)
        self._report_idle()

    def fail_requests(self, error: LmxError) -> None:
        """End every request with `error`; the worker is told."""
        for request in list(self._requests.values()):
            request.fail(error)
            self.release(request)

    def replaced(self) -> None:
        """The supervisor has another incarnation in its place, and nothing more will be submitted here.

        Its process has ended, which the link is about to notice: on a busy machine the catalog may come first. What it
        said before counts, and how it ended is for the link to say. One that says nothing is given up.
        """
        if self._farewell_timer is None:
            self._farewell_timer = self._loop.call_later(_FAREWELL_S, self._miss)

    def _miss(self) -> None:
        self._give_up("replaced", crashed=False)

    def close(self) -> None:
        """Close a link that is not needed any more."""
        self._send_aborts()
        self._end("closed", _CRASHED)

    def _give_up(self, why: str, *, crashed: bool) -> None:
        """Close the link; its owner says what becomes of its requests."""
        if not self.dead:
            requests = self._close(why)
            self._owner.on_lost(self, requests, crashed=crashed)
            self._owner.on_idle(self)

    def _end(self, why: str, code: str) -> None:
        """Close the link and end what it carries with `code`."""
        if not self.dead:
            for request in self._close(why):
                request.fail(LmxError(code, _ENDED[code]))
            self._owner.on_idle(self)

    def _close(self, why: str) -> list[Request]:
        self.dead = True
        self._link.close()
        for timer in (self._abort_timer, self._farewell_timer):
            if timer is not None:
                timer.cancel()
        event("link_closed", model=self.model, incarnation=self.incarnation, why=why, requests=len(self._requests))
        requests, self._requests = self._requests, {}
        return list(requests.values())

    # -- what the link reports ----------------------------------------------------------------------------------

    def on_connected(self) -> None:
        """The worker has answered the handshake."""
        self.connected = True
        self._owner.on_connected()

    def on_lost(self, why: str) -> None:
        """The worker is gone."""
        self._give_up(why, crashed=True)

    def on_frame(self, frame: bytes | None, *, more: bool = False) -> None:
        """Give one message of the worker to the requests it is about."""
        try:
            message = self._decoder.decode(frame or b"")
        except MalformedMessageError:
            self._protocol_error("unreadable")
            return
        if message.incarnation != self.incarnation:
            self._drop("wrong_incarnation")
        elif isinstance(message, Step):
            requests = self._requests
            now = time.monotonic()  # before anything is written: what a client does upon it comes later
            going_on = tokens = 0
            for delta in message.deltas:
                request = requests.get(delta.rid)
                # Normal: what was on its way when the request was aborted, or failed here a moment ago.
                if request is None or request.ended:
                    continue
                if request.tokens:
                    going_on += 1
                    tokens += len(delta.token_ids)
                if not request.add(delta, more=more):
                    self._out_of_turn(request)
                elif request.finish is not None:
                    self._ended_by_worker(request)
                elif request.state is _FAILED:
                    # Its client reads too slowly.
                    self.release(request)
            self._note_step(going_on, tokens, now)
        else:
            self._on_single(message)

    def _note_step(self, going_on: int, tokens: int, now: float) -> None:
        """Count the time between two tokens: of all streams of a step at once, because they take their steps together.

        `going_on` streams had had tokens before and got `tokens`; a step that was merged with others brings several.
        `now` is of `time.monotonic`.
        """
        if tokens and self._stepped_at and self._numbers is not None:
            self._numbers.gap.add((now - self._stepped_at) * going_on / tokens, tokens)
        self._stepped_at = now

    def _on_single(self, message: Accepted | Refused | Failed | Embedded | Ranked | Tokenized) -> None:
        request = self._requests.get(message.rid)
        if request is None or request.ended:
            return
        if isinstance(message, Accepted):
            if not request.accept(message.prompt_tokens, message.cached_tokens):
                self._out_of_turn(request)
            return
        if isinstance(message, Embedded | Ranked | Tokenized):
            if request.complete(message):
                self._ended_by_worker(request)
            else:
                self._out_of_turn(request)
            return
        if message.code == _CRASHED:
            # Its last words, said about each request. The others' need not be awaited: all text was sent before.
            self._give_up("said that it ends", crashed=True)
            return
        if isinstance(message, Refused):
            error = from_peer(message.code, message.message, param=message.param, retry_after_s=message.retry_after_s)
            # One whose answer has begun elsewhere is not broken off for want of room.
            goes_on = message.code == _REPLACED or (message.code == _BUSY and request.accepted)
        else:
            error = from_peer(message.code, message.message)
            goes_on = message.retryable
        self._ended_by_worker(request)
        if goes_on:
            self._owner.on_returned(self, request, error)
        else:
            request.fail(error)

    def _ended_by_worker(self, request: Request) -> None:
        del self._requests[request.rid]
        self._report_idle()

    def _report_idle(self) -> None:
        if not self._requests:
            self._owner.on_idle(self)

    # -- what goes wrong ----------------------------------------------------------------------------------------

    def _out_of_turn(self, request: Request) -> None:
        """An answer to a request that has not been accepted, or twice."""
        request.fail(LmxError("protocol_error", _ENDED["protocol_error"]))
        self.release(request)
        self._protocol_error("out_of_turn")

    def _protocol_error(self, why: str) -> None:
        self._drop(why)
        self._protocol_errors += 1
        if self._protocol_errors >= _MAX_PROTOCOL_ERRORS:
            self._end(f"{_MAX_PROTOCOL_ERRORS} bad frames, the last one {why}", "protocol_error")
            self._owner.on_misbehaved(self)

    def _drop(self, why: str) -> None:
        """Count a frame that is thrown away; log it, but not a flood of them."""
        self.dropped += 1
        now = self._loop.time()
        if now - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = now
            event(
                "protocol_error",
                level="WARNING",
                model=self.model,
                incarnation=self.incarnation,
                why=why,
                dropped=self.dropped,
            )

    def _send_aborts(self) -> None:
        if self._abort_timer is not None:
            self._abort_timer.cancel()
            self._abort_timer = None
        if not self._aborts or self.dead:
            return
        if self._link.send(encode(Abort(self.incarnation, list(self._aborts)))):
            self._aborts.clear()
        elif not self.dead:
            self._abort_timer = self._loop.call_later(_ABORT_RETRY_S, self._send_aborts)
