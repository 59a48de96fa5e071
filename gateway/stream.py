"""Writing one answer to one client, as a stream of chunks or whole."""

import asyncio
import time
from typing import Final

import msgspec
from starlette.types import Send

from gateway.context import ClientGoneError, RequestContext
from gateway.errors import error_body, send_json
from gateway.requests import Request, RequestState
from gateway.schemas import AnswerMessage, ChatCompletion, Choice, CompletionUsage, FinishReason, PromptTokensDetails
from gateway.sse import DONE, KEEPALIVE, ChunkWriter, frame
from protocol import __version__
from protocol.data import Finish
from protocol.logs import event

#: A client that has not taken a byte for this long is cut off.
WRITE_STALL_S: Final = 30.0
_STALL_CHECK_S: Final = 1.0
_FINGERPRINT: Final = f"lmx-{__version__}"
_FINISH_REASONS: Final[dict[Finish, FinishReason]] = {Finish.STOP: "stop", Finish.LENGTH: "length"}
_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class Answer:
    """What the chunks of an answer, or the answer as a whole, have in common."""

    def __init__(self, answer_id: str, model: str, context: RequestContext, request: Request) -> None:
        self.id = answer_id
        self.model = model
        self.created = int(time.time())
        self.context = context
        self.request = request

    def finish_reason(self) -> FinishReason:
        """Return why the answer ended, in OpenAI's words."""
        return _FINISH_REASONS[self.request.finish or Finish.STOP]

    def usage(self) -> CompletionUsage:
        """Return the token counts."""
        usage = self.request.usage
        prompt = self.request.prompt_tokens if usage is None else usage.prompt_tokens
        completion = 0 if usage is None else usage.completion_tokens
        cached = self.request.cached_tokens if usage is None else usage.cached_tokens
        return CompletionUsage(prompt, completion, prompt + completion, PromptTokensDetails(cached))


async def send_whole(answer: Answer, send: Send) -> None:
    """Wait for the end of the answer, then send it. Raises `LmxError` or `ClientGoneError`."""
    request = answer.request
    while not request.ended and not request.client_gone:
        await request.changed()
    if request.client_gone:
        raise ClientGoneError
    if request.error is not None:
        raise request.error
    completion = ChatCompletion(
        id=answer.id,
        created=answer.created,
        model=answer.model,
        choices=[Choice(AnswerMessage(request.take()), answer.finish_reason())],
        usage=answer.usage(),
        system_fingerprint=_FINGERPRINT,
    )
    await send_json(send, 200, msgspec.json.encode(completion), [])


class ChatStream:
    """Sends an answer as it comes. One write per turn of the event loop, whatever arrived in it."""

    def __init__(self, answer: Answer, send: Send, *, include_usage: bool, keepalive_s: float) -> None:
        self._answer = answer
        self._request = answer.request
        self._send = send
        self._include_usage = include_usage
        self._keepalive_s = keepalive_s
        self._chunks = ChunkWriter(answer.id, answer.created, answer.model, _FINGERPRINT, include_usage=include_usage)
        self._loop = asyncio.get_running_loop()
        self._writing_since: float | None = None
        self._wrote_at = self._loop.time()
        self._silent = False
        self._begun = False

    async def run(self) -> None:
        """Send everything from the headers to the end. Raises `ClientGoneError`, and `LmxError` before the headers."""
        self._request.on_overflow = self._cut_slow_client
        self._timer = self._loop.call_later(self._keepalive_s, self._tick)
        try:
            await self._until_taken()
            await self._send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
            await self._write(await self._until_end() + self._ending(), more=False)
        finally:
            self._timer.cancel()

    async def _until_taken(self) -> None:
        """Wait for the moment to send headers: as late as possible, since an error before them is a clean status.

        That is when a worker has taken the request, or when it waits for one and the client is due a comment.
        """
        request = self._request
        while not (request.accepted or request.ended or (self._silent and request.state is RequestState.WAITING)):
            if request.client_gone:
                raise ClientGoneError
            await request.changed()
        if request.error is not None:
            raise request.error

    async def _until_end(self) -> bytes:
        """Write what comes; return the last of it, unwritten, once the answer has ended."""
        request = self._request
        while True:
            if request.client_gone:
                raise ClientGoneError
            if request.accepted and not self._begun:
                self._begun = True
                await self._write(self._chunks.role())
            text = request.take()
            data = self._chunks.content(text) if text else b""
            if request.ended:
                return data
            if data:
                await self._write(data)
            elif self._silent:
                await self._write(KEEPALIVE)
            await request.changed()

    def _ending(self) -> bytes:
        error = self._request.error
        if error is not None:
            # No [DONE], and no further request on this connection: a broken answer must not look whole.
            self._answer.context.close_after_response()
            return frame(error_body(error, self._answer.context.request_id), "error")
        usage = self._chunks.usage(self._answer.usage()) if self._include_usage else b""
        return self._chunks.finish(self._answer.finish_reason()) + usage + DONE

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        """Hand bytes to the server, which waits here while the client is slow."""
        self._silent = False
        self._request.blocked = True
        self._writing_since = self._loop.time()
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self._request.blocked = False
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
                self._request.wake()
                pause = self._keepalive_s
        self._timer = self._loop.call_later(pause, self._tick)

    def _cut_slow_client(self) -> None:
        event("slow_client", level="WARNING", model=self._answer.model, request_id=self._answer.context.request_id)
        self._answer.context.abort()
