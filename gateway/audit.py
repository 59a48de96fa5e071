"""The audit within the gateway: takes each request that has ended, has it written, and tells who listens."""

import asyncio
import time
from collections import deque
from pathlib import Path
from typing import Final

import msgspec
from starlette.types import Scope

from gateway.audit_rows import Refusals, is_noted, row_of
from gateway.audit_store import AuditStore
from gateway.context import RequestContext
from gateway.exposition import AuditCounts
from protocol.audit import AuditReader, AuditRow, AuditUnreadableError, Filter, document
from protocol.errors import LmxError

#: Who begins to listen is told so many at once.
RECENT: Final = 100
#: Rows that may wait for one listener; it is dropped at the next.
_BEHIND: Final = 1_000
_LISTENERS: Final = 32
_RELEASE_S: Final = 60.0
#: A file that somebody has locked is waited for less long than that.
_REMEMBER_S: Final = 10.0


class Listener:
    """Somebody who is told of every row. `dropped`: it was too slow, and is told of nothing more."""

    def __init__(self, recent: deque[AuditRow]) -> None:
        self.dropped = False
        self._rows = deque(recent)
        self._news = asyncio.Event()
        if self._rows:
            self._news.set()

    def tell(self, row: AuditRow) -> None:
        """Queue a row."""
        if len(self._rows) >= _BEHIND:
            self.dropped = True
            self._rows.clear()
        if not self.dropped:
            self._rows.append(row)
        self._news.set()

    async def next(self, within_s: float) -> list[AuditRow]:
        """Return what there is, waiting for it for so long; nothing if nothing came, or it was dropped."""
        try:
            async with asyncio.timeout(within_s):
                await self._news.wait()
        except TimeoutError:
            return []
        self._news.clear()
        rows = list(self._rows)
        self._rows.clear()
        return rows


class Audit:
    """One per application, for the event loop. Without a store nothing is written, but listeners are still told."""

    def __init__(self, store: AuditStore | None) -> None:
        self.store = store
        self._refusals = Refusals()
        self._listeners: set[Listener] = set()
        self._recent: deque[AuditRow] = deque(maxlen=RECENT)
        self._releasing: asyncio.TimerHandle | None = None
        self._reading: asyncio.Task[None] | None = None

    def note(self, scope: Scope, context: RequestContext, *, route: str, status: int, took_s: float) -> None:
        """Note a request that has ended."""
        if not is_noted(scope.get("method", ""), route, status):
            return
        row = row_of(scope, context, route=route, status=status, now=time.time(), took_s=took_s)
        self._write(self._refusals.take(row, time.monotonic()))
        if self._refusals.holds and self._releasing is None:
            self._releasing = asyncio.get_running_loop().call_later(_RELEASE_S, self._release)

    def start(self) -> None:
        """Begin to write. The last rows of earlier gateways are read, for those who begin to listen."""
        if self.store is not None:
            self._reading = asyncio.create_task(self._remember(self.store.path))
            self.store.start()

    async def _remember(self, path: Path) -> None:
        try:
            rows = await asyncio.to_thread(_last_of, path)
        except AuditUnreadableError:
            return  # there is none yet, or the store will say what is wrong with it
        known = list(self._recent)
        noted = {(row.request_id, row.timestamp) for row in known}  # since the start, and perhaps written already
        self._recent.clear()
        self._recent.extend([*(row for row in rows if (row.request_id, row.timestamp) not in noted), *known])

    def counts(self) -> AuditCounts:
        """Return how the writing goes."""
        store = self.store
        if store is None:
            return AuditCounts()
        return AuditCounts(store.written, store.dropped, store.waiting, store.problem)

    async def listen(self) -> Listener:
        """Return somebody new who listens, and is told of the last rows first; raise `server_busy` if too many do."""
        if self._reading is not None:
            # Who listened before the last rows of earlier gateways are known would never be told them.
            await asyncio.wait({self._reading}, timeout=_REMEMBER_S)
        if len(self._listeners) >= _LISTENERS:
            raise LmxError("server_busy", f"{_LISTENERS} clients listen to the audit already, and more may not.")
        listener = Listener(self._recent)
        self._listeners.add(listener)
        return listener

    def leave(self, listener: Listener) -> None:
        """Tell somebody of nothing more."""
        self._listeners.discard(listener)

    def close(self, within_s: float) -> None:
        """Write what was held back and what waits, for at most so long."""
        self._release()
        if self._reading is not None:
            self._reading.cancel()
        if self.store is not None:
            self.store.close(within_s)

    def _release(self) -> None:
        if self._releasing is not None:
            self._releasing.cancel()
            self._releasing = None
        self._write(self._refusals.release())

    def _write(self, rows: list[AuditRow]) -> None:
        for row in rows:
            if self.store is not None:
                self.store.put(row)
            self._recent.append(row)
            for listener in list(self._listeners):
                listener.tell(row)
                if listener.dropped:
                    self._listeners.discard(listener)


def _last_of(path: Path) -> list[AuditRow]:
    with AuditReader(path) as reader:
        return reader.page(Filter(), limit=RECENT)[::-1]


def told(row: AuditRow) -> bytes:
    """Return a row as listeners get it; it has no id yet."""
    fields = document(row)
    del fields["id"]
    return msgspec.json.encode(fields)
