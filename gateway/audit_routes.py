"""The audit for administrators: a page at a time, and live as server-sent events or by WebSocket."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from gateway.admin_call import count, number, parameters, send_document, while_connected
from gateway.audit import Audit, Listener, told
from gateway.context import context_of, header
from gateway.decode import bad
from gateway.sse import KEEPALIVE, frame, response_start
from gateway.traffic import Traffic
from protocol.audit import MAX_PAGE, STATUSES, AuditReader, AuditRow, AuditUnreadableError, Filter, document
from protocol.errors import LmxError

_PAGE: Final = 100
#: Silence after which a listener is sent something, and a listener that takes nothing for this long is dropped.
_KEEPALIVE_S: Final = 15.0
_STALL_S: Final = 10.0
_FILTERS: Final = ("model", "status", "key", "client", "request_id", "error_type", "backend_type", "since", "until")
_FAR_AWAY: Final = 1e12
_MAX_TEXT: Final = 256
#: Pages that are read at a time; each has a thread.
_READERS: Final = 4
#: A web page cannot send headers: it offers this protocol, and its key as another one.
_PROTOCOL: Final = "lmx.audit"
#: Codes of WebSocket: we go away, policy violation, try again later.
_GOING_AWAY: Final = 1001
_POLICY: Final = 1008
_TRY_LATER: Final = 1013


class AuditPage:
    """`GET /admin/audit`: rows newest first, `?limit=` and filters; `next` is the `?before=` of the next page."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self._readers = asyncio.Semaphore(_READERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        values = parameters(scope, "limit", "before", *_FILTERS)
        limit = count(values, "limit", _PAGE, MAX_PAGE)
        if not limit:
            raise bad("limit", "must be at least 1")
        before = count(values, "before", 0, 2**53) or None
        wanted = _filter(values)
        store = self._audit.store
        if store is None:
            raise LmxError("not_found", "No audit is kept here: audit.enabled is false in the configuration.")
        async with self._readers:
            rows = await while_connected(receive, asyncio.to_thread(_read, store.path, wanted, limit, before))
        answer: dict[str, Any] = {
            "object": "list",
            "data": [document(row) for row in rows],
            "next": rows[-1].id if len(rows) == limit else None,
        }
        await send_document(send, msgspec.json.encode(answer))


class AuditStream:
    """`GET /admin/audit/stream`: the last rows, then each, as server-sent events."""

    def __init__(self, audit: Audit, traffic: Traffic) -> None:
        self._audit = audit
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer until the client or this gateway goes, or the client does not keep up."""
        parameters(scope)
        async with _listening(self._audit) as listener:
            await send(response_start())
            context_of(scope).close_after_response()
            try:
                await while_connected(receive, self._run(listener, send))
            except TimeoutError:
                context_of(scope).abort()

    async def _run(self, listener: Listener, send: Send) -> None:
        async with contextlib.aclosing(_batches(listener, self._traffic)) as batches:
            async for rows in batches:
                data = b"".join(frame(told(row)) for row in rows) or KEEPALIVE
                async with asyncio.timeout(_STALL_S):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class AuditSocket:
    """`/ws/audit-logs`: the same by WebSocket, one JSON message a row. The door has asked for the admin key."""

    def __init__(self, audit: Audit, traffic: Traffic) -> None:
        self._audit = audit
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve until the client or this gateway goes, or the client does not keep up."""
        socket = WebSocket(scope, receive, send)
        if not is_own_origin(scope):
            context_of(scope).error_code = "forbidden"
            await socket.close(_POLICY)
            return
        try:
            async with _listening(self._audit) as listener:
                # A browser that offers protocols wants one of them named.
                await socket.accept(_PROTOCOL if _PROTOCOL in scope.get("subprotocols", ()) else None)
                code = await self._serve(socket, listener)
        except LmxError as error:
            context_of(scope).error_code = error.code
            code = _TRY_LATER
        if socket.client_state is not WebSocketState.DISCONNECTED:
            with contextlib.suppress(TimeoutError, WebSocketDisconnect, RuntimeError, OSError):
                async with asyncio.timeout(_STALL_S):
                    await socket.close(code)

    async def _serve(self, socket: WebSocket, listener: Listener) -> int:
        """Return the code to close with."""
        telling = asyncio.ensure_future(self._tell(socket, listener))
        hearing = asyncio.ensure_future(_until_gone(socket))
        try:
            await asyncio.wait({telling, hearing}, return_when=asyncio.FIRST_COMPLETED)
            return telling.result() if telling.done() and telling.exception() is None else _TRY_LATER
        finally:
            for task in (telling, hearing):
                task.cancel()
            await asyncio.gather(telling, hearing, return_exceptions=True)

    async def _tell(self, socket: WebSocket, listener: Listener) -> int:
        async with contextlib.aclosing(_batches(listener, self._traffic)) as batches:
            async for rows in batches:
                for row in rows:
                    async with asyncio.timeout(_STALL_S):
                        await socket.send_text(told(row).decode())
        return _TRY_LATER if listener.dropped else _GOING_AWAY


@contextlib.asynccontextmanager
async def _listening(audit: Audit) -> AsyncIterator[Listener]:
    listener = await audit.listen()
    try:
        yield listener
    finally:
        audit.leave(listener)


async def _batches(listener: Listener, traffic: Traffic) -> AsyncGenerator[list[AuditRow], None]:
    """Yield what there is, nothing after some silence, until the listener was dropped or this gateway goes."""
    leaving = asyncio.ensure_future(traffic.leaving())
    try:
        while not listener.dropped and not leaving.done():
            news = asyncio.ensure_future(listener.next(_KEEPALIVE_S))
            try:
                await asyncio.wait({news, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if news.done() and not listener.dropped:
                    yield news.result()
            finally:
                news.cancel()
    finally:
        leaving.cancel()


async def _until_gone(socket: WebSocket) -> None:
    """Read what the client says, which is nothing, until it goes."""
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        while (await socket.receive())["type"] != "websocket.disconnect":
            pass


def is_own_origin(scope: Scope) -> bool:
    """Return whether a handshake comes from no web page, or from one of this very host: CORS does not guard these."""
    origin = header(scope, b"origin")
    if not origin:
        return True
    try:
        return urlsplit(origin.decode("ascii").lower()).netloc == header(scope, b"host").decode("ascii").lower() != ""
    except ValueError:
        return False


def _filter(values: Mapping[str, str]) -> Filter:
    for name in _FILTERS:
        if len(values.get(name, "")) > _MAX_TEXT:
            raise bad(name, f"is longer than {_MAX_TEXT} characters")
    if values.get("status", "error") not in STATUSES:
        raise bad("status", f"must be one of {', '.join(STATUSES)}")
    fields: dict[str, Any] = {name: values[name] for name in _FILTERS if name in values}
    fields |= {name: number(values, name, 0, _FAR_AWAY) for name in ("since", "until") if name in values}
    return Filter(**fields)


def _read(path: Path, wanted: Filter, limit: int, before: int | None) -> list[AuditRow]:
    if not path.exists():
        return []  # made with the first row
    try:
        with AuditReader(path) as reader:
            return reader.page(wanted, limit=limit, before=before)
    except AuditUnreadableError as error:
        raise LmxError("audit_unavailable", f"The audit cannot be read; {error}") from None
