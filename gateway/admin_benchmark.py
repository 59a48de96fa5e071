"""`POST /admin/benchmark`: how fast a model answers now, by requests as any other but for the network."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, Final, NoReturn

import msgspec
from starlette.types import Receive, Scope, Send

from gateway.admin_call import parameters, read_body, send_document, while_connected
from gateway.body import BodyReader
from gateway.calls import Calls, ask
from gateway.context import RequestContext, attach, context_of
from protocol.data import ChatMessage, ChatOptions, Kind, Sampling
from protocol.errors import LmxError

BENCHMARK_SCHEMA: Final = "lmx.benchmark/1"
#: One whose client has just hung up is over in a moment.
_TURN_S: Final = 0.5
#: Begins differently each time, so that no cached prefix flatters it.
_PROMPT: Final = "{time}-{number}: count from one to one thousand in words."
_PERCENTILES: Final = (("p50", 0.5), ("p95", 0.95), ("max", 1.0))


class _Wanted(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    #: So many in all, so many at a time.
    requests: Annotated[int, msgspec.Meta(ge=1, le=256)] = 8
    streams: Annotated[int, msgspec.Meta(ge=1, le=32)] = 1
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 64


class _Found:
    """What came of the requests so far. Times in seconds."""

    def __init__(self) -> None:
        self.ttft: list[float] = []
        self.whole: list[float] = []
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.failed: Counter[str] = Counter()


class Benchmark:
    """The endpoint: one benchmark at a time."""

    def __init__(self, calls: Calls, bodies: BodyReader) -> None:
        self._calls = calls
        self._bodies = bodies
        self._decoder = msgspec.json.Decoder(_Wanted)
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Measure, and answer; who hangs up ends it."""
        parameters(scope)
        wanted = await read_body(self._bodies, scope, receive, send, self._decoder)
        if wanted is None:
            return
        self._calls.find(wanted.model)
        try:
            async with asyncio.timeout(_TURN_S):
                await self._turn.acquire()
        except TimeoutError:
            raise LmxError("conflict", "A benchmark runs already: wait for its end.") from None
        try:
            with self._calls.admit():
                began = time.monotonic()
                found = await while_connected(receive, self._run(scope, wanted))
                took_s = time.monotonic() - began
        finally:
            self._turn.release()
        await send_document(send, msgspec.json.encode(_document(wanted, found, took_s)))

    async def _run(self, scope: Scope, wanted: _Wanted) -> _Found:
        found = _Found()
        numbers = iter(range(wanted.requests))
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(wanted.streams, wanted.requests)):
                tasks.create_task(self._stream(scope, wanted, numbers, found))
        return found

    async def _stream(self, scope: Scope, wanted: _Wanted, numbers: Iterator[int], found: _Found) -> None:
        for number in numbers:
            try:
                await self._one(scope, wanted, number, found)
            except LmxError as error:
                found.failed[error.code] += 1

    async def _one(self, scope: Scope, wanted: _Wanted, number: int, found: _Found) -> None:
        outer, began = context_of(scope), time.monotonic()
        own: Scope = {**scope, "state": {}}
        attach(
            own, RequestContext(f"{outer.request_id}-{number}", began, None, access=outer.access, address=outer.address)
        )
        asked = ask(
            Kind.CHAT,
            messages=[ChatMessage("user", _PROMPT.format(time=time.monotonic_ns(), number=number))],
            sampling=Sampling(max_tokens=wanted.max_tokens),
            options=ChatOptions(),
        )
        timeout_s = self._calls.config.chat_timeout_s
        async with self._calls.entered(own, _never, wanted.model, [asked], timeout_s=timeout_s) as call:
            (request,) = await call.whole()
            found.whole.append(time.monotonic() - began)
            if request.first_text_at is not None:
                found.ttft.append(request.first_text_at - began)
            found.prompt_tokens += call.prompt_tokens
            found.completion_tokens += call.completion_tokens


async def _never() -> NoReturn:
    """Receive nothing: whether the client is there is watched once, for all requests together."""
    await asyncio.Event().wait()
    raise AssertionError


def _document(wanted: _Wanted, found: _Found, took_s: float) -> dict[str, Any]:
    return {
        "schema": BENCHMARK_SCHEMA,
        "model": wanted.model,
        "requests": wanted.requests,
        "streams": wanted.streams,
        "max_tokens": wanted.max_tokens,
        "completed": len(found.whole),
        "failed": found.failed,
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": found.completion_tokens,
        "duration_s": round(took_s, 3),
        "tokens_per_s": round(found.completion_tokens / took_s, 1) if took_s else 0.0,
        "ttft_ms": _percentiles(found.ttft),
        "latency_ms": _percentiles(found.whole),
    }


def _percentiles(times: list[float]) -> dict[str, float | None]:
    """Return some of them in milliseconds, None for each if there is none."""
    ordered = sorted(times)
    return {
        name: round(ordered[max(0, math.ceil(share * len(ordered)) - 1)] * 1000, 1) if ordered else None
        for name, share in _PERCENTILES
    }
