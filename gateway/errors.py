"""Errors as HTTP: OpenAI's envelope, or RFC 9457 problem details under `/admin` and for a client that asks for them."""

from typing import Final

import msgspec
from starlette.types import Scope, Send

from gateway.context import context_of, header, is_admin_path
from protocol.errors import LmxError, envelope, problem

_PROBLEM_TYPE: Final = b"application/problem+json"


async def send_json(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """Send one whole JSON response. `headers` may name another content type."""
    named = {name for name, _ in headers}
    if b"content-type" not in named:
        headers = [(b"content-type", b"application/json"), *headers]
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(error: LmxError, request_id: str) -> bytes:
    """Return OpenAI's error envelope."""
    return msgspec.json.encode(envelope(error, request_id))


def error_headers(error: LmxError) -> list[tuple[bytes, bytes]]:
    """Return the headers an error calls for."""
    if error.retry_after_s is None:
        return []
    return [(b"retry-after", str(error.retry_after_s).encode())]


async def send_error(
    scope: Scope, send: Send, error: LmxError, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    """Answer with `error`; only before the response has started."""
    context = context_of(scope)
    request_id = context.request_id
    context.error_code = error.code
    all_headers = [*error_headers(error), *(headers or [])]
    if is_admin_path(scope["path"]) or _PROBLEM_TYPE in header(scope, b"accept").lower():
        body = msgspec.json.encode(problem(error, request_id))
        all_headers.append((b"content-type", _PROBLEM_TYPE))
    else:
        body = error_body(error, request_id)
    await send_json(send, error.spec.status, body, all_headers)
