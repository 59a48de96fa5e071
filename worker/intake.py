"""Requests on their way into the book: those that take long to prepare do so on threads of their own.

Tokenizing a long prompt or compiling a schema takes from milliseconds to seconds, and the IO thread brings everyone's
tokens. What is quick is prepared at once, and so may overtake what is not; requests of one pace keep their order.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue

import msgspec

from protocol.data import Submit
from protocol.errors import LmxError
from protocol.logs import event
from worker.jobs import Event, Pace, Prepared, Readied
from worker.requests import Book


class Unready(msgspec.Struct):
    """A request that is being prepared. `dropped` is written by the IO thread, `outcome` by the one that prepares."""

    gateway: bytes
    submit: Submit
    received_at: float
    outcome: Prepared | Exception | None = None
    dropped: bool = False


class Intake:
    """Stands before the book. All methods are called by the IO thread; `emit` is called by others."""

    def __init__(
        self,
        prepare: Callable[[Submit], Prepared],
        pace: Callable[[Submit], Pace],
        emit: Callable[[Event], None],
    ) -> None:
        self._prepare = prepare
        self._pace = pace
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
        unready = self._pending[key] = Unready(gateway, submit, now)
        if pace not in self._queues:
            queue = self._queues[pace] = SimpleQueue()
            threading.Thread(target=self._run, args=[queue], name="prepare", daemon=True).start()
        self._queues[pace].put(unready)

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
        ready = self._ready
        if ready is None or ready.submit is not submit:
            return self._prepare(submit)
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
                unready.outcome = self._prepare(unready.submit)
            except Exception as error:  # noqa: BLE001 - raised again where preparing at once would have raised it
                unready.outcome = error
            self._emit(Readied(unready))
