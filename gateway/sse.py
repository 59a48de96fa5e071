"""Server-sent events, and the chunks of a chat stream.

Only `data:`, `event: error` and comments are ever written. Never `id:`: openai-python then takes each comment for an
empty event and fails.
"""

from typing import Any, Final

import msgspec

from gateway.schemas import CompletionUsage

#: Sent while nothing else is, so that proxies and clients keep the connection.
KEEPALIVE: Final = b": keepalive\n\n"
#: Line ends of Unicode that JSON leaves as they are and on which some clients (httpx `iter_lines`) split lines.
_UNICODE_LINE_ENDS: Final = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))

_encode: Final = msgspec.json.Encoder().encode


def frame(data: bytes, event: str = "") -> bytes:
    """Return one event. A line end within `data` becomes a further `data:` line, so nothing can end it early."""
    head = f"event: {event}\n".encode() if event else b""
    if b"\n" not in data and b"\r" not in data:
        return b"%bdata: %b\n\n" % (head, data)
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return b"%b%b\n\n" % (head, b"\n".join(b"data: " + line for line in lines))


DONE: Final = frame(b"[DONE]")


def json_line(value: Any) -> bytes:
    """Return `value` as JSON without any byte sequence that some reader takes for a line end."""
    data = _encode(value)
    if not data.isascii():
        for char, escaped in _UNICODE_LINE_ENDS:
            if char in data:
                data = data.replace(char, escaped)
    return data


class ChunkWriter:
    """Writes the chunks of one stream. What they have in common is encoded once."""

    def __init__(self, answer_id: str, created: int, model: str, fingerprint: str, *, include_usage: bool) -> None:
        common: dict[str, Any] = {
            "id": answer_id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._common = json_line(common)[:-1]
        #: OpenAI puts a null on every chunk but the last when usage was asked for, and nothing when it was not.
        self._no_usage = b',"usage":null' if include_usage else b""
        self._content_head = self._common + b',"choices":[{"index":0,"delta":{"content":'
        self._content_tail = b'},"logprobs":null,"finish_reason":null}]' + self._no_usage + b"}"

    def role(self) -> bytes:
        """Return the first chunk."""
        return self._chunk(b'{"role":"assistant","content":""}', b"null")

    def content(self, text: str) -> bytes:
        """Return a chunk with some of the answer: the one that matters for speed."""
        return frame(self._content_head + json_line(text) + self._content_tail)

    def finish(self, reason: str) -> bytes:
        """Return the chunk that says why the answer ended."""
        return self._chunk(b"{}", _encode(reason))

    def usage(self, usage: CompletionUsage) -> bytes:
        """Return the chunk with the token counts."""
        return frame(self._common + b',"choices":[],"usage":' + _encode(usage) + b"}")

    def _chunk(self, delta: bytes, finish: bytes) -> bytes:
        choice = b',"choices":[{"index":0,"delta":%b,"logprobs":null,"finish_reason":%b}]' % (delta, finish)
        return frame(self._common + choice + self._no_usage + b"}")
