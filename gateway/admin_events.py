"""`/admin/events`: the supervisor's journal as server-sent events, for as long as the client listens."""

import asyncio
import contextlib
from typing import Final

import msgspec
from starlette.types import Receive, Scope, Send

from gateway.admin_call import count, number, parameters, while_connected
from gateway.context import context_of
from gateway.forward import Forwarder
from gateway.sse import KEEPALIVE, frame, response_start
from gateway.traffic import Traffic
from protocol.errors import LmxError

#: Entries that are sent first, and at most.
_LAST: Final = 20
_MAX_LAST: Final = 1000
_KEEPALIVE_S: Final = 15.0
#: How often a supervisor that is away is looked for.
_AGAIN_S: Final = 1.0
#: A client that has not taken an event for this long is cut off.
_STALL_S: Final = 30.0
_FAR_AWAY: Final = 1e12


class _When(msgspec.Struct):
    ts: float


class Events:
    """One `data:` line of JSON per entry. A supervisor that is replaced is found again, and nothing is told twice."""

    def __init__(self, forwarder: Forwarder, traffic: Traffic) -> None:
        self._forwarder = forwarder
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer until the client or this gateway goes."""
        values = parameters(scope, "last", "since")
        last = count(values, "last", _LAST, _MAX_LAST)
        since = number(values, "since", 0.0, _FAR_AWAY)
        with self._forwarder.follower():
            await send(response_start())
            if scope["method"] == "HEAD":
                await send({"type": "http.response.body", "body": b""})
                return
            context_of(scope).close_after_response()
            await while_connected(receive, self._run(_Writer(scope, send), last, since))

    async def _run(self, writer: "_Writer", last: int, since: float) -> None:
        # What a client should see that connects while nothing happens: that it is connected.
        await writer.write(KEEPALIVE)
        following = asyncio.ensure_future(self._follow(writer, last, since))
        leaving = asyncio.ensure_future(self._traffic.leaving())
        silence = asyncio.ensure_future(_keep_alive(writer))
        try:
            done, _ = await asyncio.wait({following, leaving, silence}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except TimeoutError:
            return  # the client was cut off
        finally:
            for task in (following, leaving, silence):
                task.cancel()
            await asyncio.gather(following, leaving, silence, return_exceptions=True)
        await writer.end()

    async def _follow(self, writer: "_Writer", last: int, since: float) -> None:
        while True:
            with contextlib.suppress(LmxError):  # no supervisor: the next one is waited for
                async with contextlib.aclosing(self._forwarder.events(last, since)) as entries:
                    async for entry in entries:
                        await writer.write(frame(entry))
                        since = max(since, msgspec.json.decode(entry, type=_When).ts)
            last = _MAX_LAST if since else last
            await asyncio.sleep(_AGAIN_S)


class _Writer:
    """Writes to one client, one piece at a time."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._context = context_of(scope)
        self._send = send
        self._lock = asyncio.Lock()

    async def write(self, data: bytes) -> None:
        """Send; a client that takes nothing for long is cut off."""
        async with self._lock:
            try:
                async with asyncio.timeout(_STALL_S):
                    await self._send({"type": "http.response.body", "body": data, "more_body": True})
            except TimeoutError:
                self._context.abort()
                raise

    async def end(self) -> None:
        """Say that nothing more comes."""
        async with self._lock:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})


async def _keep_alive(writer: _Writer) -> None:
    while True:
        await asyncio.sleep(_KEEPALIVE_S)
        await writer.write(KEEPALIVE)
