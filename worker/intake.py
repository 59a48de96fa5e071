"""Requests on their way into the book: those that take long to prepare do so on threads of their own.

Tokenizing a long prompt or compiling a schema takes from milliseconds to seconds, and the IO thread brings everyone's
tokens. What is quick is prepared at once, and so may overtake what is not; requests of one pace keep their order.
"""

import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Final

import msgspec

from protocol.data import Submit
from protocol.errors import LmxError
from protocol.logs import event
from worker.jobs import Event, Pace, Prepared, Readied, Vocabulary
from worker.requests import TEXT_KINDS, Book, tokenize_with

#: Characters that are tokenized in a millisecond or two.
SHORT_CHARS: Final = 4_000
#: A request prepared, or both sides of one that is only tokenized.
Outcome = Prepared | tuple[list[int], str]


def pace_of_inputs(submit: Submit) -> Pace:
    """Return how long it takes to tokenize the inputs of a request that has no conversation."""
    chars = sum(len(text) for text in submit.inputs if isinstance(text, str))
    return Pace.QUICK if chars <= SHORT_CHARS else Pace.LONG_TEXT


class Unready(msgspec.Struct):
    """A request that is being prepared. `dropped` is written by the IO thread, `outcome` by the one that prepares."""

    gateway: bytes
    submit: Submit
    received_at: float
    outcome: Outcome | Exception | None = None
    dropped: bool = False


class Intake:
    """Stands before the book. All methods are called by the IO thread; `emit` is called by others."""

    def __init__(
        self,
        prepare: Callable[[Submit], Prepared],
        pace: Callable[[Submit], Pace],
        emit: Callable[[Event], None],
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self._prepare = prepare
        self._pace = pace
        self._tokenize = partial(tokenize_with, vocabulary)
        self._emit = emit
        #: One thread each: a hostile schema holds up schemas at most.
        self._queues: dict[Pace, SimpleQueue[Unready]] = {}
        self._pending: dict[tuple[bytes, int], Unready] = {}
        self._ready: Unready | None = None

    @property
    def pending(self) -> int:
        """Requests that are being prepared."""
        return len(self._pending)

    def submit(self, book: Book, gateway: bytes, submit: Submit, now: float) -> None:
        """Hand a request to the book, now or when it is prepared. It counts as waiting until then."""
        pace = self._pace(submit)
        if pace is Pace.QUICK:
            book.submit(gateway, submit, now)
            return
        key = gateway, submit.rid
        if key in self._pending:
            event("request_duplicate", level="WARNING", trace=submit.trace, rid=submit.rid)
            return
        try:
            book.check_room(submit, self.pending)
        except LmxError as error:
            book.refuse(gateway, submit, error)
            return
        queue = self._queue(pace)
        if queue is None:
            busy = LmxError("server_busy", "The system gives no thread to prepare this request. Try again later.")
            book.refuse(gateway, submit, busy)
            return
        unready = self._pending[key] = Unready(gateway, submit, now)
        queue.put(unready)

    def readied(self, book: Book, unready: Unready, now: float) -> None:
        """Hand over what a thread has prepared, unless nobody wants it any more."""
        if unready.dropped:
            return
        submit = unready.submit
        del self._pending[unready.gateway, submit.rid]
        left = submit.deadline_s - (now - unready.received_at)
        self._ready = msgspec.structs.replace(unready, submit=msgspec.structs.replace(submit, deadline_s=left))
        book.submit(unready.gateway, self._ready.submit, now)
        self._ready = None

    def prepare(self, submit: Submit) -> Prepared:
        """Return a request prepared; what the book calls. Raises `LmxError`."""
        outcome = self._outcome_of(submit)
        if outcome is None:
            return self._prepare(submit)
        assert isinstance(outcome, Prepared), "made by the kind of the request"
        return outcome

    def tokenize(self, submit: Submit) -> tuple[list[int], str]:
        """Return both sides of what is to be tokenized, or the other way round. Raises `LmxError`."""
        outcome = self._outcome_of(submit)
        if outcome is None:
            return self._tokenize(submit)
        assert not isinstance(outcome, Prepared), "made by the kind of the request"
        return outcome

    def _outcome_of(self, submit: Submit) -> Outcome | None:
        """Return what a thread has made of the request that is being handed over, if it is this one."""
        ready = self._ready
        if ready is None or ready.submit is not submit:
            return None
        assert ready.outcome is not None
        if isinstance(ready.outcome, Exception):
            raise ready.outcome
        return ready.outcome

    def abort(self, gateway: bytes, rids: list[int]) -> None:
        """Drop what is no longer wanted."""
        for rid in rids:
            self._drop((gateway, rid))

    def forget_gateway(self, gateway: bytes) -> None:
        """Drop what nobody could be told of."""
        for key in [key for key in self._pending if key[0] == gateway]:
            self._drop(key)

    def _queue(self, pace: Pace) -> "SimpleQueue[Unready] | None":
        """Return the queue of a thread, None if the system gives no thread: the IO thread must outlive that."""
        if pace not in self._queues:
            queue: SimpleQueue[Unready] = SimpleQueue()
            try:
                threading.Thread(target=self._run, args=[queue], name="prepare", daemon=True).start()
            except RuntimeError:
                return None
            self._queues[pace] = queue
        return self._queues[pace]

    def _drop(self, key: tuple[bytes, int]) -> None:
        unready = self._pending.pop(key, None)
        if unready is not None:
            unready.dropped = True

    def _run(self, queue: "SimpleQueue[Unready]") -> None:
        while True:
            unready = queue.get()
            if unready.dropped:
                continue
            try:
                make = self._tokenize if unready.submit.kind in TEXT_KINDS else self._prepare
                unready.outcome = make(unready.submit)
            except Exception as error:  # noqa: BLE001 - raised again where preparing at once would have raised it
                unready.outcome = error
            self._emit(Readied(unready))
