"""What every inference endpoint has in common: from a body to requests at a desk, and out again.

with calls.admit():
    parsed = await calls.parsed(scope, receive, send, parse)
    if parsed is None:
        return
    async with calls.entered(scope, receive, parsed.model, [ask(Kind.EMBED, inputs=...)], timeout_s=...) as call:
        (request,) = await call.whole()
        ... request.result ...
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from gateway.bell import Bell
from gateway.body import BodyReader
from gateway.call import Call, tokens_of
from gateway.catalog import CatalogView
from gateway.context import Worked, context_of, header
from gateway.kinds import check_kind
from gateway.numbers import Numbers
from gateway.parameters import ignored_header
from gateway.pool import WorkerPool
from gateway.priority import priority_of
from gateway.requests import Request, RequestState, Rids
from gateway.spans import asked_for, error_of, outcome, span_name
from gateway.traffic import Traffic
from protocol.config import GatewayConfig
from protocol.control import CatalogModel
from protocol.data import MAX_FRAME_BYTES, ChatMessage, ChatOptions, Kind, Sampling, Submit
from protocol.errors import LmxError
from protocol.logs import event
from protocol.tracing import NullTracer, Tracer, traced

_ON_CRASH: Final = {b"continue": True, b"fail": False}
#: A larger body is parsed beside the event loop.
_LARGE_BODY_BYTES: Final = 1024 * 1024
_INT64: Final = 2**64
ParsedT = TypeVar("ParsedT")


def ask(
    kind: Kind,
    *,
    messages: Sequence[ChatMessage] = (),
    sampling: Sampling | None = None,
    options: ChatOptions | None = None,
    inputs: Sequence[str | list[int]] = (),
    echo: bool = False,
    group: int = 0,
    dimensions: int = 0,
) -> Submit:
    """Return what is asked of a worker, for `Calls.entered` to address.

    Those of a call that have the same `group`, not 0, have the same prompt and may share its prefill.
    """
    return Submit(
        incarnation=0,
        rid=0,
        kind=kind,
        messages=list(messages),
        sampling=sampling or Sampling(),
        deadline_s=0,
        options=options,
        inputs=list(inputs),
        echo=echo,
        group=group,
        dimensions=dimensions,
    )


def seeded(first: Submit, count: int) -> list[Submit]:
    """Return `first` and others like it, each with the next seed if there is one."""
    seed = first.sampling.seed
    if seed is None:
        return [first] * count
    replace = msgspec.structs.replace
    return [first, *(replace(first, sampling=replace(first.sampling, seed=_int64(seed + k))) for k in range(1, count))]


def _int64(number: int) -> int:
    """Begin anew at the lower end behind the upper."""
    half = _INT64 // 2
    return (number + half) % _INT64 - half


class Calls:
    """Takes calls. One per application."""

    def __init__(
        self,
        config: GatewayConfig,
        catalog: CatalogView,
        pool: WorkerPool,
        traffic: Traffic,
        numbers: Numbers,
        tracer: Tracer | None = None,
        *,
        isolate_prefixes: bool = False,
    ) -> None:
        """`isolate_prefixes`: requests of different clients share no cached prefix."""
        self.config = config
        self._isolate = isolate_prefixes
        self._catalog = catalog
        self._pool = pool
        self._traffic = traffic
        self._numbers = numbers
        self._tracer = tracer or NullTracer()
        self._bodies = BodyReader(config.max_body_bytes)
        self._parsing = asyncio.Semaphore(1)
        self._rids = Rids()

    def admit(self) -> contextlib.AbstractContextManager[None]:
        """Count one call while the block runs; raise `shutting_down` if none is taken any more."""
        return self._traffic.admit()

    async def parsed(
        self, scope: Scope, receive: Receive, send: Send, parse: Callable[[bytes, GatewayConfig], ParsedT]
    ) -> ParsedT | None:
        """Return what `parse` makes of the body, None when the body was refused and the client knows.

        `parse` raises `LmxError` and touches nothing: a large body is parsed in another thread.
        """
        body = await self._bodies.read(scope, receive, send)
        if body is None:
            return None
        if len(body) > _LARGE_BODY_BYTES:
            # One at a time: a decoder keeps the interpreter to itself, and the loop gets it back only in between.
            async with self._parsing:
                return await asyncio.to_thread(parse, body, self.config)
        return parse(body, self.config)

    def find(self, model: str) -> CatalogModel:
        """Return a model as the supervisor last described it; raise `model_not_found`."""
        return self._catalog.find(model)

    def name_ignored(self, scope: Scope, names: Sequence[str]) -> None:
        """Name the fields that nobody here knows in a header of the response, whatever it will be."""
        if names:
            context_of(scope).headers.append((b"x-lmx-ignored", ignored_header(names)))

    @contextlib.asynccontextmanager
    async def entered(
        self,
        scope: Scope,
        receive: Receive,
        model: str,
        asked: Sequence[Submit],
        *,
        timeout_s: float,
        streams: bool = False,
    ) -> AsyncIterator[Call]:
        """Have what `ask` returned taken care of; whichever way the block is left, no worker is left working.

        Raises `LmxError` for what is refused at once. `timeout_s` counts from the head of the HTTP request.
        """
        continues = self._continues(scope)
        context = context_of(scope)
        priority = priority_of(scope, context.access.priority if context.access is not None else 0)
        await self._catalog.arrived()
        if not context.take_up():
            # What has arrived meanwhile is read in one turn of the loop, and then known to come.
            await asyncio.sleep(0)
        found = self._catalog.find(model)
        check_kind(found, asked[0].kind)
        self._pool.want(found)
        client = scope["client"][0] if scope.get("client") else ""
        deadline_at = context.started + timeout_s
        bell = Bell[Request](blocked=not streams)
        requests: list[Request] = []
        prompts: list[Request] = []
        groups: dict[int, int] = {}
        span = self._tracer.start(span_name(asked[0].kind, found.id), context.traceparent, asked_for(found.id, asked))
        context.traceparent = span.traceparent
        coming = context.take_up() + len(asked)
        for wanted in asked:
            coming -= 1
            rid = self._rids.new()
            if wanted.group not in groups:
                groups[wanted.group or rid] = rid
                first = True
            else:
                first = False
            submit = msgspec.structs.replace(
                wanted,
                rid=rid,
                deadline_s=timeout_s,
                trace=context.request_id,
                client=client,
                priority=priority,
                group=groups[wanted.group] if wanted.group else 0,
                traceparent=context.traceparent,
                salt=client if self._isolate else "",
                coming=coming,
            )
            request = Request(
                found.id,
                submit,
                bell,
                limit=self.config.max_unsent_bytes if streams else MAX_FRAME_BYTES,
                streams=streams,
                continues=continues,
                deadline_at=deadline_at,
            )
            requests.append(request)
            if first:
                prompts.append(request)
        call = Call(found, context, requests, prompts, bell, self._pool.desk_of(found))
        late = LmxError("timeout", f"The answer was not complete after {timeout_s:g} s.")
        timer = asyncio.get_running_loop().call_later(deadline_at - time.monotonic(), call.fail, late)
        watcher = asyncio.create_task(_watch(receive, bell))
        try:
            call.enter()
            if call.error is not None:
                raise call.error
            yield call
        finally:
            timer.cancel()
            watcher.cancel()
            call.leave()
            context.tokens_used = call.prompt_tokens + sum(len(request.tokens) for request in requests)
            self._count(call)
            span.end(outcome(call), error_of(call))
            _log(call, streams, time.monotonic())

    def _count(self, call: Call) -> None:
        numbers = self._numbers.of(call.model.id)
        for request in call.requests:
            numbers.ended(request, call.context.started)
        for prompt in call.prompts:
            if prompt.accepted or prompt.result is not None:
                numbers.prompted(*tokens_of(prompt))

    def _continues(self, scope: Scope) -> bool:
        """Return whether the client wants its requests to outlive their process."""
        wish = header(scope, b"x-lmx-on-crash").strip().lower()
        if not wish:
            return self.config.on_crash == "continue"
        if wish not in _ON_CRASH:
            raise LmxError("invalid_value", "X-LMX-On-Crash must be 'continue' or 'fail'.", param="X-LMX-On-Crash")
        return _ON_CRASH[wish]


async def _watch(receive: Receive, bell: Bell[Request]) -> None:
    """Notice that the client has gone, also while nothing is written to it."""
    while (await receive())["type"] != "http.disconnect":
        pass
    bell.leave()


def _log(call: Call, streams: bool, now: float) -> None:
    """Write the one line that says how an inference went, and keep it for the audit: numbers and our names only."""
    context = call.context
    started = context.started
    first_texts = [request.first_text_at for request in call.requests if request.first_text_at is not None]
    failed = next((request.error for request in call.requests if request.error is not None), None)
    unfinished = any(request.state is not RequestState.FINISHED for request in call.requests)
    worked = Worked(
        model=call.model.id,
        stream=streams,
        priority=call.requests[0].priority,
        incarnation=next((r.incarnation for r in reversed(call.requests) if r.incarnation is not None), None),
        ttft_ms=round((min(first_texts) - started) * 1000, 1) if first_texts else None,
        prompt_tokens=call.prompt_tokens,
        completion_tokens=sum(len(r.tokens) for r in call.requests) if unfinished else call.completion_tokens,
        cached_tokens=call.cached_tokens,
        error=failed.code if failed is not None else None,
        left=failed is None and unfinished,
    )
    context.worked = worked
    fields: dict[str, Any] = {
        "request_id": context.request_id,
        "model": worked.model,
        "kind": call.requests[0].kind.name.lower(),
        **traced(call.context.traceparent),
        "stream": streams,
        "client": context.client,
        "priority": worked.priority,
        "latency_ms": round((now - started) * 1000, 1),
        "prompt_tokens": worked.prompt_tokens,
        "cached_tokens": worked.cached_tokens,
        "completion_tokens": worked.completion_tokens,
    }
    if context.client_id:
        fields["client_id"] = context.client_id
    if len(call.requests) > 1:
        fields["requests"] = len(call.requests)
    if worked.ttft_ms is not None:
        fields["ttft_ms"] = worked.ttft_ms
    crashes = sum(request.crashes for request in call.requests)
    if crashes:
        fields["crashes"] = crashes
    if failed is not None and failed.code == "server_busy":
        waited = {"request_id": context.request_id, "model": worked.model, "latency_ms": fields["latency_ms"]}
        event("semaphore_timeout_stream" if streams else "semaphore_timeout", level="WARNING", **waited)
    if failed is not None:
        event("inference_failed", level="WARNING", code=failed.code, **fields)
    elif unfinished:
        event("inference_cancelled", **fields)
    else:
        event("inference_complete", **fields)
