"""Reading a request's body, with a limit on its size, its time, and on all bodies together."""

import asyncio
import contextlib
from typing import Final

from starlette.types import Message, Receive, Scope, Send

from gateway.context import ClientGoneError, context_of, header
from gateway.errors import send_error
from protocol.errors import LmxError

#: A body of 16 MiB over a slow wireless network still makes it.
BODY_TIMEOUT_S: Final = 30.0
#: Bodies of the largest size that may be arriving at once, whatever the number of connections.
_MAX_LARGE_BODIES: Final = 16
#: How long, and for how many times the limit, a refused body is read and thrown away, so that its client gets to
#: read the answer instead of a connection reset.
_DISCARD_S: Final = 2.0
_DISCARD_TIMES: Final = 4


class BodyReader:
    """Reads bodies up to `limit` bytes. One per application: it also bounds their sum."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0

    async def read(self, scope: Scope, receive: Receive, send: Send) -> bytes | None:
        """Return the body, or None after answering that it is too large.

        Raises `ClientGoneError` when the client leaves meanwhile, `LmxError` when it is too slow.
        """
        parts: list[bytes] = []
        declared = header(scope, b"content-length")
        if declared.isdigit() and int(declared) > self._limit:
            await self._refuse(scope, receive, send)
            return None
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                whole = await self._collect(receive, parts)
        except TimeoutError:
            context_of(scope).close_after_response()
            raise LmxError("request_timeout", f"The body did not arrive within {BODY_TIMEOUT_S:g} s.") from None
        if whole:
            return parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        await self._refuse(scope, receive, send)
        return None

    async def _collect(self, receive: Receive, parts: list[bytes]) -> bool:
        """Fill `parts`; return whether the body ended within the limit."""
        size = 0
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                part = message.get("body", b"")
                size += len(part)
                self._held += len(part)
                if size > self._limit:
                    return False
                if self._held > self._limit * _MAX_LARGE_BODIES:
                    raise LmxError("server_busy", "Too many large request bodies are arriving at once; try again.")
                parts.append(part)
                if not message.get("more_body", False):
                    return True
        finally:
            self._held -= size

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413, then read on for a moment without keeping anything, then close."""

        async def send_all_but_end(message: Message) -> None:
            if message["type"] == "http.response.body":
                message["more_body"] = True
            await send(message)

        error = LmxError("body_too_large", f"The body is larger than {self._limit} bytes.")
        await send_error(scope, send_all_but_end, error, [(b"connection", b"close")])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_S):
                await self._discard(receive)
        await send({"type": "http.response.body", "body": b""})

    async def _discard(self, receive: Receive) -> None:
        budget, more = self._limit * _DISCARD_TIMES, True
        while more and budget > 0:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            budget -= len(message.get("body", b""))
            more = message.get("more_body", False)
