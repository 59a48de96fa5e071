"""Writing an answer to one client as it comes."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from starlette.types import Scope, Send

from gateway.call import Call
from gateway.chunks import ChunkWriter
from gateway.context import writer_of
from gateway.errors import error_body
from gateway.requests import Request, RequestState
from gateway.responses import CompletionUsage, PromptTokensDetails
from gateway.sse import DONE, KEEPALIVE, frame, response_start
from protocol.logs import event

#: A client that has not taken a byte for this long is cut off.
WRITE_STALL_S: Final = 30.0
_STALL_CHECK_S: Final = 1.0


def usage_of(call: Call) -> CompletionUsage:
    """Return the token counts of a call that has ended."""
    prompt, completion = call.prompt_tokens, call.completion_tokens
    return CompletionUsage(prompt, completion, prompt + completion, PromptTokensDetails(call.cached_tokens))


async def send_events(
    call: Call, writer: ChunkWriter, scope: Scope, send: Send, *, include_usage: bool, keepalive_s: float
) -> None:
    """Send an answer as it comes, from its head to its end: directly to the connection where that can be."""
    put = writer_of(scope)
    await EventStream(call, writer, send, include_usage=include_usage, keepalive_s=keepalive_s, put=put).run()


class EventStream:
    """Sends an answer as it comes. One write per turn of the event loop, whatever arrived in it."""

    def __init__(
        self,
        call: Call,
        writer: ChunkWriter,
        send: Send,
        *,
        include_usage: bool,
        keepalive_s: float,
        put: Callable[[bytes], bool] | None = None,
    ) -> None:
        """`put` is `gateway.context.writer_of` the request; without it everything goes through `send`."""
        self._call = call
        self._bell = call.bell
        self._writer = writer
        self._send = send
        self._put = put
        self._include_usage = include_usage
        self._keepalive_s = keepalive_s
        self._indexes = {request.rid: index for index, request in enumerate(call.requests)}
        self._begun: set[int] = set()
        self._finished: set[int] = set()
        self._loop = asyncio.get_running_loop()
        self._writing_since: float | None = None
        self._wrote_at = self._loop.time()
        self._silent = False

    async def run(self) -> None:
        """Send everything from the headers to the end. Raises `ClientGoneError`, and `LmxError` before the headers."""
        self._bell.on_overflow = self._cut_slow_client
        self._timer = self._loop.call_later(self._keepalive_s, self._tick)
        try:
            await self._until_taken()
            await self._send(response_start())
            await self._write(await self._until_end() + self._ending(), more=False)
        finally:
            self._timer.cancel()

    async def _until_taken(self) -> None:
        """Wait for the moment to send headers: as late as possible, since an error before them is a clean status.

        That is when a worker has taken every request, or when those it has not wait for one and the client is due a
        comment.
        """
        taken = False
        while not taken:
            await self._call.news()
            if self._call.error is not None:
                raise self._call.error
            taken = all(map(self._taken, self._call.under_way))

    def _taken(self, request: Request) -> bool:
        return request.accepted or request.ended or (self._silent and request.state is RequestState.WAITING)

    async def _until_end(self) -> bytes:
        """Write what comes; return the last of it, unwritten, once the answer has ended."""
        call = self._call
        data = self._gained(call.requests)
        while not call.ended:
            if data:
                await self._write(data)
            elif self._silent:
                await self._write(KEEPALIVE)
            data = await self._more()
        return data

    async def _more(self) -> bytes:
        """Return what has been gained: with `put`, only what it did not take, and the last."""
        if self._put is None:
            return self._gained(await self._call.news())
        self._left: asyncio.Future[bytes] = self._loop.create_future()
        self._bell.listen(self._pump)
        for index, request in enumerate(self._call.requests):
            if not request.scored:  # logprobs may be held back, and text comes with them
                request.direct = partial(self._write_text, index)
        try:
            return await self._left
        finally:
            self._listen_no_more()

    def _listen_no_more(self) -> None:
        self._bell.listen(None)
        for request in self._call.requests:
            request.direct = None

    def _write_text(self, index: int, text: str) -> bool:
        """Write text that goes on at once; return False if something comes before it, or it needs waiting."""
        assert self._put is not None
        if self._bell.dirty or index not in self._begun:
            return False
        try:
            if not self._put(self._writer.text(index, text)):
                return False
        except Exception as error:  # noqa: BLE001 - raised again in the task
            self._stop(error)
            return True
        self._silent = False
        self._wrote_at = self._loop.time()
        return True

    def _pump(self, rung: Sequence[Request]) -> None:
        """Write what has been gained if that needs no waiting, else let the task do it."""
        assert self._put is not None
        try:
            self._call.hear(rung)
            data = self._gained(rung)
            if not self._call.ended:
                if not data and self._silent:
                    data = KEEPALIVE
                if not data:
                    return
                if self._put(data):
                    self._silent = False
                    self._wrote_at = self._loop.time()
                    return
        except Exception as error:  # noqa: BLE001 - raised again in the task
            self._stop(error)
            return
        self._listen_no_more()
        if not self._left.done():
            self._left.set_result(data)

    def _stop(self, error: Exception) -> None:
        self._listen_no_more()
        if not self._left.done():
            self._left.set_exception(error)

    def _gained(self, rung: Sequence[Request]) -> bytes:
        if len(rung) == 1:
            return self._events(rung[0])
        return b"".join([self._events(request) for request in rung])

    def _events(self, request: Request) -> bytes:
        """Return what a request has gained."""
        index = self._indexes[request.rid]
        data = self._writer.piece(index, request)
        if index not in self._begun and request.accepted:
            self._begun.add(index)
            data = self._writer.begin(index) + data
        if request.finish is not None and index not in self._finished:
            self._finished.add(index)
            data += self._writer.finish(index, request.finish)
        return data

    def _ending(self) -> bytes:
        error = self._call.error
        if error is not None:
            # No [DONE], and no further request on this connection: a broken answer must not look whole.
            self._call.context.close_after_response()
            self._call.context.error_code = error.code
            return frame(error_body(error, self._call.context.request_id), "error")
        usage = self._writer.usage(usage_of(self._call)) if self._include_usage else b""
        return usage + DONE

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        """Hand bytes to the server, which waits here while the client is slow."""
        self._silent = False
        self._bell.blocked = True
        self._writing_since = self._loop.time()
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self._bell.blocked = False
        self._writing_since = None
        self._wrote_at = self._loop.time()

    def _tick(self) -> None:
        """See to silence in both directions."""
        now = self._loop.time()
        if self._writing_since is not None:
            if now - self._writing_since >= WRITE_STALL_S:
                self._cut_slow_client()
                return
            pause = _STALL_CHECK_S
        else:
            pause = self._wrote_at + self._keepalive_s - now
            if pause <= 0:
                self._silent = True
                self._bell.wake()
                pause = self._keepalive_s
        self._timer = self._loop.call_later(pause, self._tick)

    def _cut_slow_client(self) -> None:
        context = self._call.context
        event("slow_client", level="WARNING", model=self._call.model.id, request_id=context.request_id)
        context.abort()
