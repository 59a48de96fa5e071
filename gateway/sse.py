"""Server-sent events.

Only `data:`, `event: error` and comments are ever written. Never `id:`: openai-python then takes each comment for an
empty event and fails.
"""

from typing import Any, Final

import msgspec

from protocol.lines import escape_line_ends

#: Sent while nothing else is, so that proxies and clients keep the connection.
KEEPALIVE: Final = b": keepalive\n\n"
#: Nothing in between may keep or collect events.
_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)

_encode: Final = msgspec.json.Encoder().encode


def frame(data: bytes, event: str = "") -> bytes:
    """Return one event. A line end within `data` becomes a further `data:` line, so nothing can end it early."""
    head = f"event: {event}\n".encode() if event else b""
    if b"\n" not in data and b"\r" not in data:
        return b"%bdata: %b\n\n" % (head, data)
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return b"%b%b\n\n" % (head, b"\n".join(b"data: " + line for line in lines))


DONE: Final = frame(b"[DONE]")


def response_start() -> dict[str, Any]:
    """Return the ASGI message that begins a stream of events."""
    return {"type": "http.response.start", "status": 200, "headers": list(_HEADERS)}


def json_line(value: Any) -> bytes:
    """Return `value` as JSON without any byte sequence that some reader takes for a line end."""
    return escape_line_ends(_encode(value))
