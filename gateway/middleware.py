"""Around every request: its id, its log line, the boundary where an error becomes an answer. Raw ASGI throughout."""

import re
import secrets
import time
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.context import ClientGoneError, RequestContext, attach, connection_of, context_of, header
from gateway.errors import send_error
from gateway.numbers import Numbers
from gateway.traffic import Traffic
from protocol.errors import LmxError
from protocol.logs import event, exception_event
from protocol.tracing import parse_traceparent, traced

_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_DOUBLE_SLASHES: Final = re.compile(r"/{2,}")
#: Polled every few seconds by machines: their lines would bury all others.
_QUIET_ROUTES: Final = frozenset({"/healthz", "/readyz", "/admin/health", "/admin/events", "/metrics"})
#: nginx's number for "the client went away"; only ever logged.
_CLIENT_GONE_STATUS: Final = 499


class RequestIdMiddleware:
    """Outermost: gives each request an id, puts it on every response and logs one `http_request` line."""

    def __init__(self, app: ASGIApp, traffic: Traffic, numbers: Numbers) -> None:
        self._app = app
        self._traffic = traffic
        self._numbers = numbers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext(request_id(header(scope, b"x-request-id")), time.monotonic(), connection_of(scope))
        context.traceparent = parse_traceparent(header(scope, b"traceparent"))
        attach(scope, context)
        status = _CLIENT_GONE_STATUS

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._traffic.closing:
                    context.headers.append((b"connection", b"close"))
                if context.traceparent:
                    context.headers.append((b"traceparent", context.traceparent.encode("ascii")))
                message["headers"] = [
                    *message["headers"],
                    *context.headers,
                    (b"x-request-id", context.request_id.encode()),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self._numbers.answered(route, status, context.error_code)
            if route not in _QUIET_ROUTES:
                event(
                    "http_request",
                    method=scope["method"],
                    route=route,
                    status=status,
                    ms=round((time.monotonic() - context.started) * 1000, 1),
                    request_id=context.request_id,
                    **traced(context.traceparent),
                )


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


def request_id(offered: bytes) -> str:
    """Return the client's id if it is safe to log and echo, else a new one."""
    if _REQUEST_ID.fullmatch(offered):
        return offered.decode("ascii")
    # 22 characters of URL-safe base64 are 128 random bits, which is what 16 bytes give.
    return f"req_{secrets.token_urlsafe(16)}"
