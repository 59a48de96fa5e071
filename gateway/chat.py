"""`POST /v1/chat/completions`: from the body to a worker and back."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, Final

from starlette.types import Receive, Scope, Send

from gateway.body import BodyReader
from gateway.catalog import CatalogView
from gateway.context import RequestContext, context_of, header
from gateway.parameters import ignored_header
from gateway.pool import WorkerPool
from gateway.requests import Request, RequestState, Rids
from gateway.stream import Answer, ChatStream, send_whole
from gateway.traffic import Traffic
from gateway.validate import ChatCall, parse_chat
from protocol.config import GatewayConfig
from protocol.data import MAX_FRAME_BYTES, Kind, Submit
from protocol.errors import LmxError
from protocol.logs import event

_ON_CRASH: Final = {b"continue": True, b"fail": False}


class ChatCompletions:
    """The endpoint."""

    def __init__(self, config: GatewayConfig, catalog: CatalogView, pool: WorkerPool, traffic: Traffic) -> None:
        self._config = config
        self._catalog = catalog
        self._pool = pool
        self._traffic = traffic
        self._bodies = BodyReader(config.max_body_bytes)
        self._rids = Rids()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; every failure before the first byte is raised as `LmxError`."""
        with self._traffic.admit():
            body = await self._bodies.read(scope, receive, send)
            if body is None:
                return
            call = parse_chat(body, self._config)
            del body
            context = context_of(scope)
            continues = self._continues(scope)
            if call.ignored:
                context.headers.append((b"x-lmx-ignored", ignored_header(call.ignored)))
            client = scope["client"][0] if scope.get("client") else ""
            async with self._entered(call, context, receive, client=client, continues=continues) as request:
                answer = Answer(f"chatcmpl-{secrets.token_hex(12)}", call.model, context, request)
                if call.stream:
                    stream = ChatStream(
                        answer, send, include_usage=call.include_usage, keepalive_s=self._config.keepalive_s
                    )
                    await stream.run()
                else:
                    await send_whole(answer, send)

    @contextlib.asynccontextmanager
    async def _entered(
        self, call: ChatCall, context: RequestContext, receive: Receive, *, client: str, continues: bool
    ) -> AsyncIterator[Request]:
        """Have the call taken care of; whichever way the block is left, no worker is left working."""
        await self._catalog.arrived()
        desk = self._pool.desk_of(self._catalog.find(call.model))
        deadline_at = context.started + self._config.chat_timeout_s
        submit = Submit(
            incarnation=0,
            rid=self._rids.new(),
            kind=Kind.CHAT,
            messages=call.messages,
            sampling=call.sampling,
            deadline_s=self._config.chat_timeout_s,
            trace=context.request_id,
            client=client,
        )
        request = Request(
            call.model,
            submit,
            limit=self._config.max_unsent_bytes if call.stream else MAX_FRAME_BYTES,
            streams=call.stream,
            continues=continues,
            deadline_at=deadline_at,
        )
        late = LmxError("timeout", f"The answer was not complete after {self._config.chat_timeout_s:g} s.")
        timer = asyncio.get_running_loop().call_later(deadline_at - time.monotonic(), request.fail, late)
        watcher = asyncio.create_task(_watch(receive, request))
        try:
            try:
                desk.enter(request)
            except LmxError as error:
                request.fail(error)
                raise
            yield request
        finally:
            timer.cancel()
            watcher.cancel()
            desk.leave(request)
            _log(call, context, request, time.monotonic())

    def _continues(self, scope: Scope) -> bool:
        """Return whether the client wants the request to outlive its process."""
        wish = header(scope, b"x-lmx-on-crash").strip().lower()
        if not wish:
            return self._config.on_crash == "continue"
        if wish not in _ON_CRASH:
            raise LmxError("invalid_value", "X-LMX-On-Crash must be 'continue' or 'fail'.", param="X-LMX-On-Crash")
        return _ON_CRASH[wish]


async def _watch(receive: Receive, request: Request) -> None:
    """Notice that the client has gone, also while nothing is written to it."""
    while (await receive())["type"] != "http.disconnect":
        pass
    request.leave()


def _log(call: ChatCall, context: RequestContext, request: Request, now: float) -> None:
    """Write the one line that says how an inference went: numbers only."""
    fields: dict[str, Any] = {
        "request_id": context.request_id,
        "model": call.model,
        "stream": call.stream,
        "latency_ms": round((now - context.started) * 1000, 1),
        "prompt_tokens": request.prompt_tokens,
    }
    if request.first_text_at is not None:
        fields["ttft_ms"] = round((request.first_text_at - context.started) * 1000, 1)
    if request.crashes:
        fields["crashes"] = request.crashes
    if request.error is not None:
        event("inference_failed", level="WARNING", code=request.error.code, **fields)
    elif request.state is not RequestState.FINISHED:
        event("inference_cancelled", **fields)
    else:
        completion = 0 if request.usage is None else request.usage.completion_tokens
        event("inference_complete", completion_tokens=completion, **fields)
