"""Requests over real sockets, from a process of its own: `python -m bench.load URL MODEL WORKLOAD_JSON`.

`LMX_BENCH_KEY` is sent with each request, if it is set.

Each stream is one connection that sends its next request when its last answer has ended. The parsing is as little as a
client can do, because it runs on the cores of the server that it measures: bytes are collected as they come, their
times noted, and the rest is read when the answer is complete. Prints one JSON line. What fails is counted, not raised.
"""

import asyncio
import json
import os
import re
import sys
import time
from collections import Counter
from typing import Any, Final, NamedTuple, cast
from urllib.parse import urlsplit

import msgspec
import uvloop

from bench.measures import percentile
from bench.options import end_cleanly
from bench.workloads import Workload, prompt

#: A piece of answer; the first chunk of a stream names the role, with an empty or no content.
_FIRST_TEXT: Final = re.compile(rb'"(?:content|text)":\s*"[^"]')
_EVENT: Final = re.compile(rb'"(?:content|text)":\s*"((?:[^"\\]|\\.)*)"')
_USAGE: Final = re.compile(rb'"completion_tokens":\s*(\d+)')
_STATUS: Final = re.compile(rb"HTTP/1\.[01] (\d{3})")
_LENGTH: Final = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_CHUNKED: Final = re.compile(rb"\r\ntransfer-encoding:\s*chunked", re.IGNORECASE)
#: The last chunk of a chunked body.
_END: Final = b"0\r\n\r\n"
#: How long an answer may take: some servers lose one and never say so. Two tokens a second are enough.
_PATIENCE_S: Final = 30.0
_PER_TOKEN_S: Final = 0.5
_PER_PROMPT_WORD_S: Final = 0.05
_CONNECT_S: Final = 30.0


class Served(NamedTuple):
    """One answer. `error` is empty, a status, or what happened to the connection."""

    ttft_s: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    events: int = 0
    #: Of the tokens those that came after the first read, by the length of their text: the first may bring several.
    later_tokens: float = 0.0
    gaps_s: tuple[float, ...] = ()
    error: str = ""


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self.closed = True
        self._data = bytearray()
        self._first_at = self._text_at = self._last_at = 0.0
        self._gaps: list[float] = []
        self._body_at = self._first_until = 0
        self._length = -1
        self._chunked = False
        self._transport: asyncio.WriteTransport | None = None
        self._answer: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Be ready to ask."""
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is no subclass of it
        self.closed = False

    def data_received(self, data: bytes) -> None:
        """Note the time, and whether this was all."""
        now = time.perf_counter()
        self._data += data
        if not self._body_at:
            self._read_head()
        if self._first_at:
            if _FIRST_TEXT.search(data):  # not what only ends the answer
                self._gaps.append(now - self._text_at)
                self._text_at = now
        elif _FIRST_TEXT.search(self._data):
            self._first_at = self._text_at = now
            self._first_until = len(self._data)
        self._last_at = now
        if self._body_at and self._complete():
            self._resolve()

    def connection_lost(self, _exc: Exception | None) -> None:
        """End the answer, if the server ends answers so."""
        self.closed = True
        self._last_at = time.perf_counter()
        self._resolve()

    async def ask(self, request: bytes, *, streams: bool) -> Served:
        """Send a request and read its answer to the end."""
        assert self._transport is not None
        self._data.clear()
        self._gaps.clear()
        self._first_at = 0.0
        self._body_at, self._length, self._chunked = 0, -1, False
        self._answer = answer = asyncio.get_running_loop().create_future()
        sent_at = time.perf_counter()
        self._transport.write(request)
        await answer
        status = _STATUS.match(self._data)
        if status is None:
            return Served(error="reset")
        if status[1] != b"200":
            return Served(error=status[1].decode())
        if not streams:
            return Served(self._last_at - sent_at, self._last_at - sent_at)
        usage = _USAGE.findall(self._data)
        if b"data: [DONE]" not in self._data or not self._first_at:
            return Served(error="cut off")
        texts = _EVENT.findall(self._data)
        tokens = int(usage[-1]) if usage else len(texts)
        first = sum(map(len, _EVENT.findall(self._data, 0, self._first_until)))
        later = tokens * (1 - first / sum(map(len, texts)))
        return Served(self._first_at - sent_at, self._last_at - sent_at, tokens, len(texts), later, tuple(self._gaps))

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()

    def _read_head(self) -> None:
        end = self._data.find(b"\r\n\r\n")
        if end >= 0:
            self._body_at = end + 4
            head = bytes(self._data[: end + 2])
            length = _LENGTH.search(head)
            self._chunked = _CHUNKED.search(head) is not None
            self._length = int(length[1]) if length else -1

    def _complete(self) -> bool:
        if self._chunked:
            return self._data.endswith(_END)
        return self._length >= 0 and len(self._data) >= self._body_at + self._length

    def _resolve(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(None)
        self._answer = None


def make_request(host: str, model: str, workload: Workload, text: str, key: str = "") -> bytes:
    """Return the bytes of a request: greedy and streaming, or for a vector."""
    body: dict[str, object]
    if workload.kind == "embeddings":
        path, body = "embeddings", {"model": model, "input": text}
    else:
        path, body = (
            "chat/completions",
            {
                "model": model,
                "messages": [{"role": "user", "content": text}],
                "temperature": 0,
                "max_tokens": workload.tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        )
    data = json.dumps(body).encode()
    head = f"POST /v1/{path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    head += f"authorization: Bearer {key}\r\n" if key else ""
    return head.encode() + b"content-length: %d\r\n\r\n" % len(data) + data


async def run_load(url: str, model: str, workload: Workload) -> tuple[list[Served], float]:
    """Run a workload; return what became of each request, and the seconds from the first request to the last answer.

    Connections and requests are made before that: in-process has its prompts too before it begins.
    """
    place = urlsplit(url)
    host, port = place.hostname or "", place.port or 80
    loop = asyncio.get_running_loop()
    key = os.environ.get("LMX_BENCH_KEY", "")

    async def connect() -> Connection | None:
        try:
            async with asyncio.timeout(_CONNECT_S):
                return (await loop.create_connection(Connection, host, port))[1]
        except OSError:  # a timeout is one
            return None

    async def stream(number: int) -> list[Served]:
        requests = [
            make_request(place.netloc, model, workload, prompt(workload, number, request), key)
            for request in range(workload.requests)
        ]
        connection = await connect()
        await everyone.wait()
        began_at.append(time.perf_counter())
        served = []
        for request in requests:
            if connection is None or connection.closed:
                connection = await connect()
            if connection is None:
                served.append(Served(error="refused"))
                continue
            try:
                async with asyncio.timeout(patience_s):
                    served.append(await connection.ask(request, streams=workload.kind == "chat"))
            except TimeoutError:
                connection.close()
                connection = None  # it is only told to close: the next request needs another
                served.append(Served(error="timeout"))
        if connection is not None:
            connection.close()
        return served

    patience_s = _PATIENCE_S + _PER_TOKEN_S * workload.tokens + _PER_PROMPT_WORD_S * workload.prompt_words
    everyone = asyncio.Barrier(workload.streams)
    began_at: list[float] = []
    served = await asyncio.gather(*map(stream, range(workload.streams)))
    return [one for some in served for one in some], time.perf_counter() - min(began_at)


def summary(served: list[Served], seconds: float) -> dict[str, Any]:
    """Return what the report needs of it; times in seconds."""
    good = [one for one in served if not one.error]
    gaps = [gap for one in good for gap in one.gaps_s]
    lasting = [one for one in good if one.later_tokens and one.seconds > one.ttft_s]
    paces = [one.later_tokens / (one.seconds - one.ttft_s) for one in lasting]
    return {
        "seconds": seconds,
        "requests": len(good),
        "tokens": sum(one.tokens for one in good),
        "events": sum(one.events for one in good),
        "ttft_s": [one.ttft_s for one in good],
        "gap_p50_s": percentile(gaps, 0.5),
        "gap_p99_s": percentile(gaps, 0.99),
        "stream_tokens_per_s": percentile(paces, 0.5),
        "errors": dict(Counter(one.error for one in served if one.error)),
    }


async def _timed(url: str, model: str, workload: Workload) -> dict[str, Any]:
    found = summary(*await run_load(url, model, workload))
    times = os.times()
    return {**found, "client_cpu_s": times.user + times.system}


def main() -> int:
    """Run one workload against one server."""
    if len(sys.argv) != 4:
        sys.stderr.write("usage: python -m bench.load URL MODEL WORKLOAD_JSON\n")
        return 64
    end_cleanly()
    url, model, given = sys.argv[1:]
    workload = msgspec.json.decode(given, type=Workload)
    # nan, where nothing was answered, becomes null.
    sys.stdout.write(msgspec.json.encode(uvloop.run(_timed(url, model, workload))).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
