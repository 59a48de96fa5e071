"""Streaming chat requests over real sockets, from a process of its own: `python -m bench.load URL MODEL`.

Each stream is one connection that sends its next request when its last answer has ended. The parsing is as little as
a client can do, because it runs on the cores of the server that it measures: bytes are collected as they come, the
first text is looked for, and the rest is read when the answer is complete. Prints one JSON line.
"""

import argparse
import asyncio
import json
import re
import sys
import time
from typing import Final, NamedTuple, cast
from urllib.parse import urlsplit

import uvloop

#: A chunk with some text; the first chunk of a stream names the role, with an empty one.
_FIRST_TEXT: Final = re.compile(rb'"content":"[^"]')
_USAGE: Final = re.compile(rb'"completion_tokens":(\d+)')
_STATUS_OK: Final = b"HTTP/1.1 200"
#: The last chunk of a chunked body.
_END: Final = b"0\r\n\r\n"
_PATIENCE_S: Final = 300.0


class LoadFailedError(Exception):
    """The server did not answer as it should."""


class Served(NamedTuple):
    """One answer: seconds to its first text, tokens by the server's own count, events it came in."""

    ttft_s: float
    tokens: int
    events: int


def question(stream: int, request: int) -> str:
    """Return the text of a prompt, a different one for each stream and request."""
    return f"Question {request} of reader {stream}: what did people find near the river, and how long did it take them?"


class Connection(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._sent_at = 0.0
        self._first_at = 0.0
        self._transport: asyncio.WriteTransport | None = None
        self._answer: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        self._data += data
        if not self._first_at and _FIRST_TEXT.search(self._data):
            self._first_at = time.perf_counter()
        if self._answer is not None and (self._data.endswith(_END) or not self._data.startswith(_STATUS_OK)):
            self._answer.set_result(None)
            self._answer = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None:
            self._answer.set_exception(LoadFailedError(f"connection lost: {exc}, after {bytes(self._data[-200:])!r}"))

    async def ask(self, request: bytes) -> Served:
        """Send a request and read its answer to the end."""
        assert self._transport is not None
        self._data.clear()
        self._first_at = 0.0
        self._answer = answer = asyncio.get_running_loop().create_future()
        self._sent_at = time.perf_counter()
        self._transport.write(request)
        await answer
        usage = _USAGE.findall(self._data)
        if b"data: [DONE]" not in self._data or not usage or not self._first_at:
            raise LoadFailedError(f"not a whole answer: {bytes(self._data[:200])!r} … {bytes(self._data[-200:])!r}")
        return Served(self._first_at - self._sent_at, int(usage[-1]), self._data.count(b'"content":"'))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def make_request(host: str, model: str, text: str, tokens: int, key: str = "") -> bytes:
    """Return the bytes of a greedy, streaming chat request."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    head += f"authorization: Bearer {key}\r\n" if key else ""
    return head.encode() + b"content-length: %d\r\n\r\n" % len(data) + data


async def run_load(
    url: str, model: str, *, streams: int, tokens: int, requests: int, key: str = ""
) -> dict[str, object]:
    """Run `streams` streams of `requests` requests each; return what `bench.inprocess` returns, and `events`."""
    place = urlsplit(url)
    host, port = place.hostname or "", place.port or 80
    loop = asyncio.get_running_loop()
    connections = [(await loop.create_connection(Connection, host, port))[1] for _ in range(streams)]

    async def stream(number: int, connection: Connection) -> list[Served]:
        texts = [question(number, request) for request in range(requests)]
        return [await connection.ask(make_request(place.netloc, model, text, tokens, key)) for text in texts]

    started = time.perf_counter()
    async with asyncio.timeout(_PATIENCE_S):
        of_streams = await asyncio.gather(*(stream(number, each) for number, each in enumerate(connections)))
    seconds = time.perf_counter() - started
    for connection in connections:
        connection.close()
    served = [answer for answers in of_streams for answer in answers]
    return {
        "seconds": seconds,
        "tokens": sum(answer.tokens for answer in served),
        "ttft_s": [answer.ttft_s for answer in served],
        "events": sum(answer.events for answer in served),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--requests", type=int, default=1, help="requests of each stream, one after the other")
    parser.add_argument("--key", default="", help="sent with each request")
    args = parser.parse_args()
    asked = {"streams": args.streams, "tokens": args.tokens, "requests": args.requests}
    load = run_load(args.url, args.model, **asked, key=args.key)
    try:
        print(json.dumps(uvloop.run(load)))
    except (LoadFailedError, OSError, TimeoutError) as error:
        sys.stderr.write(f"load: {type(error).__name__}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
