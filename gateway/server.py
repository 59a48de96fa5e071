"""uvicorn, adapted: bounded request heads, errors in our envelope, signals left to the process that embeds it."""

import asyncio
import contextlib
import functools
import logging
import socket
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gateway.context import CONNECTION_EXTENSION, WRITE_EXTENSION
from gateway.errors import error_body
from gateway.ids import new_request_id
from protocol.config import SecurityConfig
from protocol.errors import LmxError
from protocol.logs import event

#: httptools has no limit of its own; h11's is the same.
MAX_HEAD_BYTES: Final = 64 * 1024
#: Far more than clients and proxies send; each costs time wherever headers are looked through.
MAX_HEADERS: Final = 256
#: A client that has not sent its headers by then is holding a descriptor for nothing.
HEAD_TIMEOUT_S: Final = 10.0
#: Some turns of the loop.
_HEAD_GRACE_S: Final = 0.1
#: Idle connections are closed after this long; longer than the 5 s in which common clients reuse one.
KEEP_ALIVE_S: Final = 75
#: After the drain only last bytes are on their way.
_CLOSE_TIMEOUT_S: Final = 2


#: Who listens by WebSocket has nothing to say.
_MAX_WEBSOCKET_MESSAGE: Final = 4096


def _websocket_protocol(**arguments: Any) -> asyncio.Protocol:
    """Return uvicorn's protocol for one WebSocket. What it imports takes as long as a tenth of the gateway's start."""
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol  # noqa: PLC0415

    return WebSocketsSansIOProtocol(**arguments)


class Arrivals:
    """How many requests are here in full while nobody works on them yet."""

    def __init__(self) -> None:
        self.count = 0


class _HeadTooLargeError(Exception):
    """Stops the parser."""


class HttpProtocol(HttpToolsProtocol):
    """One connection. Offers itself to the application as the `lmx.connection` extension."""

    _head_bytes = 0
    _header_count = 0
    #: Bytes read since the parser last finished anything: it keeps a header, trailer or chunk extension to itself
    #: until it is whole.
    _undigested_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _arrived = False

    def __init__(self, arrivals: Arrivals, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._arrivals = arrivals
        #: Requests in their order whose responses are not complete: the first is being answered, the others wait.
        #: uvicorn knows only the last one.
        self._open: deque[RequestResponseCycle] = deque()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock for the first request."""
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clock; tell everyone who answers."""
        self._stop_head_timer()
        self.take_up()
        super().connection_lost(exc)
        self._disconnect()

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived."""
        self._undigested_bytes += len(data)
        super().data_received(data)
        if self._undigested_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._head_bytes = self._undigested_bytes
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """Begin a request's head."""
        super().on_message_begin()
        self._head_bytes = 0
        self._header_count = 0
        self._start_head_timer()
        scope: Any = self.scope
        scope["extensions"] = {CONNECTION_EXTENSION: self}

    def on_url(self, url: bytes) -> None:
        """Take a piece of the request target."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header, or trailer."""
        self._header_count += 1
        self._count_head(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """End a request's head."""
        self._stop_head_timer()
        self._undigested_bytes = 0
        scope: Any = self.scope
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:  # not an upgrade
            self._answered()
            self._open.append(self.cycle)
        # Of this request, also while another one on the same connection waits behind it.
        scope["extensions"][WRITE_EXTENSION] = functools.partial(_write_chunk, self.cycle)

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        self._undigested_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        self._undigested_bytes = 0
        super().on_message_complete()
        # An upgrade has no cycle, what was refused before its end is nobody's work any more, and what waits for the
        # answer to another request on its connection does not come at once.
        cycle: RequestResponseCycle | None = self.cycle
        if not self._arrived and cycle is not None and self._answered() is cycle:
            self._arrived = True
            self._arrivals.count += 1

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or too much of it, and close."""
        if self._head_bytes > MAX_HEAD_BYTES:
            msg = f"The request line and headers are longer than {MAX_HEAD_BYTES} bytes."
        elif self._header_count > MAX_HEADERS:
            msg = f"There are more than {MAX_HEADERS} headers."
        self._refuse(LmxError("invalid_value", msg))

    def take_up(self) -> int:
        """Note that somebody works on what has arrived; return how many others wait for that."""
        if self._arrived:
            self._arrived = False
            self._arrivals.count -= 1
        return self._arrivals.count

    def close_after_response(self) -> None:
        """Do not keep the connection alive after the response that is running."""
        cycle = self._answered()
        if cycle is not None:
            cycle.keep_alive = False

    def abort(self) -> None:
        """Close at once and drop what is unsent."""
        # The transport reports the loss one turn of the loop later; until then uvicorn would complain.
        self._disconnect()
        self.transport.abort()

    def _answered(self) -> RequestResponseCycle | None:
        """Return the request that is being answered."""
        while self._open and self._open[0].response_complete:
            self._open.popleft()
        return self._open[0] if self._open else None

    def _disconnect(self) -> None:
        self._answered()
        for cycle in self._open:
            cycle.disconnected = True
            cycle.message_event.set()

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES or self._header_count > MAX_HEADERS:
            raise _HeadTooLargeError

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        # What arrived while this process had no time for it is read before it is called late.
        self._head_timer = self.loop.call_later(_HEAD_GRACE_S, self._head_missing)

    def _head_missing(self) -> None:
        self._head_timer = None
        self._refuse(LmxError("request_timeout", f"The headers did not arrive within {HEAD_TIMEOUT_S:g} s."))

    def _refuse(self, error: LmxError) -> None:
        """Answer outside of the application and close. Nothing is written into a response that has begun."""
        self._stop_head_timer()
        if self.transport.is_closing():
            return
        cycle = self._answered()
        if cycle is not None and cycle.response_started:
            self.abort()
            return
        request_id = new_request_id()
        event("http_refused", code=error.code, request_id=request_id)
        body = error_body(error, request_id)
        lines = (
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"x-request-id: {request_id}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[error.spec.status] + lines.encode("ascii") + body)
        self.transport.close()


def _write_chunk(cycle: RequestResponseCycle, data: bytes) -> bool:
    """Do what `cycle.send` does with a piece of a body, if it would not wait; return whether it is done."""
    if not cycle.chunked_encoding or cycle.flow.write_paused or cycle.disconnected or cycle.response_complete:
        return False
    cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
    return True


class Server(uvicorn.Server):
    """A server that says when it accepts and leaves signals alone: draining is `gateway.service`'s business."""

    def __init__(self, app: ASGIApp, on_started: Callable[[], None], security: SecurityConfig) -> None:
        # Its warnings are about clients; the http_request event says what an operator needs of them.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        config = uvicorn.Config(
            app,
            http=functools.partial(HttpProtocol, Arrivals()),  # type: ignore[arg-type]
            ws=_websocket_protocol,  # type: ignore[arg-type]
            ws_max_size=_MAX_WEBSOCKET_MESSAGE,
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
            ssl_certfile=security.tls_certificate or None,
            ssl_keyfile=security.tls_key or None,
        )
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept."""
        await super().startup(sockets)
        self._on_started()

    def stop_accepting(self) -> None:
        """Close the listening socket in this process; open connections go on."""
        for server in self.servers:
            server.close()

    def close_idle(self) -> None:
        """Close the connections on which nothing is being answered, and the others after their response."""
        for connection in list(self.server_state.connections):
            connection.shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    def connection_count(self) -> int:
        """Return how many client connections are open."""
        return len(self.server_state.connections)
