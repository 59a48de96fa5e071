"""Refusing a request whose body nobody wants to read."""

import asyncio
import contextlib
from typing import Final

from starlette.types import Message, Receive, Scope, Send

from gateway.context import header
from gateway.errors import send_error
from protocol.errors import LmxError

#: A body up to this size is left to the server, which throws it away and keeps the connection.
_SMALL: Final = 64 * 1024
#: How long, and for how many bytes, a larger one is read and thrown away after the answer, so that its client gets to
#: read the answer instead of a connection reset.
_DISCARD_S: Final = 2.0
_DISCARD_BYTES: Final = 64 * 1024 * 1024


def has_large_body(scope: Scope) -> bool:
    """Return whether a body follows that is large, or may be."""
    declared = header(scope, b"content-length")
    if declared.isdigit():
        return int(declared) > _SMALL
    return bool(header(scope, b"transfer-encoding"))


async def refuse_unread(scope: Scope, receive: Receive, send: Send, error: LmxError) -> None:
    """Answer without having read the body, throw away some of what is on its way, and close."""

    async def send_all_but_end(message: Message) -> None:
        if message["type"] == "http.response.body":
            message["more_body"] = True
        await send(message)

    await send_error(scope, send_all_but_end, error, [(b"connection", b"close")])
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            budget, more = _DISCARD_BYTES, True
            while more and budget > 0:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                budget -= len(message.get("body", b""))
                more = message.get("more_body", False)
    await send({"type": "http.response.body", "body": b""})
