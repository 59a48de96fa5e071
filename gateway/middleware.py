"""Around every request: its id, its log line, the boundary where an error becomes an answer. Raw ASGI throughout."""

import re
import time
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.audit import Audit
from gateway.audit_rows import CLIENT_GONE, QUIET
from gateway.context import ClientGoneError, RequestContext, attach, connection_of, context_of, header
from gateway.errors import send_error
from gateway.ids import client_id, request_id
from gateway.numbers import Numbers
from gateway.traffic import Traffic
from protocol.errors import LmxError
from protocol.logs import event, exception_event
from protocol.tracing import parse_traceparent, traced

_DOUBLE_SLASHES: Final = re.compile(r"/{2,}")
_UNDER_V1: Final = re.compile(r"^/(?!admin|ws|ui|metrics|healthz|readyz|openapi)")
#: Polled every few seconds by machines: their lines would bury all others, as long as all is well.
_QUIET_ROUTES: Final = QUIET | {"/admin/health", "/admin/events", "/admin/audit/stream"}


class RequestIdMiddleware:
    """Outermost: gives each request an id, puts it on every response, logs one `http_request` line, has it audited.

    `paths`: those of routes, by which also what never gets to its route is called in the log; no others are.
    """

    def __init__(
        self,
        app: ASGIApp,
        traffic: Traffic,
        numbers: Numbers,
        audit: Audit | None = None,
        paths: frozenset[str] = frozenset(),
    ) -> None:
        self._app = app
        self._traffic = traffic
        self._numbers = numbers
        self._audit = audit
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        context = RequestContext(request_id(scope), time.monotonic(), connection_of(scope), client_id=client_id(scope))
        context.traceparent = parse_traceparent(header(scope, b"traceparent"))
        attach(scope, context)
        status = CLIENT_GONE

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] in {"http.response.start", "websocket.accept"}:
                status = message.get("status", 101)
                context.take_up()
                if self._traffic.closing:
                    context.headers.append((b"connection", b"close"))
                if context.traceparent:
                    context.headers.append((b"traceparent", context.traceparent.encode("ascii")))
                message["headers"] = [
                    *message.get("headers", ()),
                    *context.headers,
                    (b"x-request-id", context.request_id.encode()),
                ]
            elif message["type"] == "websocket.close" and status == CLIENT_GONE:
                status = 403  # what a handshake is answered that is not accepted
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            context.take_up()
            self._note(scope, context, status)

    def _note(self, scope: Scope, context: RequestContext, status: int) -> None:
        route = getattr(scope.get("route"), "path", "") or (scope["path"] if scope["path"] in self._paths else "")
        took = time.monotonic() - context.started
        self._numbers.answered(route or "unmatched", status, context.error_code)
        if route not in _QUIET_ROUTES or status != 200:
            event(
                "http_request",
                method=scope.get("method", "websocket"),
                route=route or "unmatched",
                status=status,
                ms=round(took * 1000, 1),
                request_id=context.request_id,
                client=context.client,
                **traced(context.traceparent),
            )
        if self._audit is not None:
            shown = _UNDER_V1.sub("/v1/", route) if route else "unmatched"
            self._audit.note(scope, context, route=shown, status=status, took_s=took)


class ErrorBoundary:
    """Turns whatever an endpoint raises into an answer, or into a closed connection once the answer has begun."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except ClientGoneError:
            context_of(scope).abort()
        except LmxError as error:
            await self._answer(scope, send, error, started=started)
        except Exception as error:  # noqa: BLE001 - the boundary: logged without its text, answered as a 500
            exception_event("request_crashed", error, request_id=context_of(scope).request_id)
            failed = LmxError("internal_error", "The server failed on this request; its log names the request id.")
            await self._answer(scope, send, failed, started=started)

    async def _answer(self, scope: Scope, send: Send, error: LmxError, *, started: bool) -> None:
        if started:
            # Half an answer must not look whole: cut it.
            context_of(scope).abort()
            return
        await send_error(scope, send, error)


class PathMiddleware:
    """Makes one path of its variants: with and without `/v1`, double slashes, a slash at the end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        if scope["type"] == "http":
            scope["path"] = canonical_path(scope["path"])
        await self._app(scope, receive, send)


def canonical_path(path: str) -> str:
    """Return the path under which a route is registered."""
    path = _DOUBLE_SLASHES.sub("/", path)
    if path == "/v1" or path.startswith("/v1/"):
        path = path[3:]
    return path.rstrip("/") or "/"
