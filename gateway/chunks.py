"""The events of the two kinds of stream. What the events of a stream have in common is encoded once."""

from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

import msgspec
from msgspec import UNSET

from gateway.logprobs import LegacyWriter, Shown, chat_logprobs
from gateway.requests import Extras, Request
from gateway.responses import CompletionUsage, FinishReason, FunctionPiece, ToolCallPiece
from gateway.sse import frame, json_line
from protocol.data import Finish, TokenLogprob, ToolDelta

_encode: Final = msgspec.json.Encoder().encode
#: Of an enum's members, by number: hashing one is slow.
_REASONS: Final[tuple[FinishReason | None, ...]] = (None, "stop", "length", "tool_calls")


def finish_reason(finish: Finish | None) -> FinishReason:
    """Return why an answer ended, in OpenAI's words."""
    return _REASONS[finish or Finish.STOP] or "stop"


class ChunkWriter(Protocol):
    """Writes the events of one stream."""

    def begin(self, index: int) -> bytes:
        """Return what comes first of a choice."""

    def piece(self, index: int, request: Request) -> bytes:
        """Take what a request has gained and return it as events."""

    def text(self, index: int, text: str) -> bytes:
        """Return text that comes with nothing else as one event: the one that matters for speed."""

    def finish(self, index: int, finish: Finish | None) -> bytes:
        """Return the event that says why the choice ended."""

    def usage(self, usage: CompletionUsage) -> bytes:
        """Return the event with the token counts."""


class _Common:
    """The fields that every event of a stream has."""

    def __init__(self, kind: str, answer_id: str, created: int, model: str, fingerprint: str, *, usage: bool) -> None:
        common: dict[str, Any] = {
            "id": answer_id,
            "object": kind,
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._common = json_line(common)[:-1]
        #: OpenAI puts a null on every chunk but the last when usage was asked for, and nothing when it was not.
        self._no_usage = b',"usage":null' if usage else b""

    def usage(self, usage: CompletionUsage) -> bytes:
        """Return the event with the token counts."""
        return frame(self._common + b',"choices":[],"usage":' + _encode(usage) + b"}")


class ChatChunks(_Common):
    """`chat.completion.chunk`s."""

    def __init__(
        self, answer_id: str, created: int, model: str, fingerprint: str, *, usage: bool, choices: int = 1
    ) -> None:
        super().__init__("chat.completion.chunk", answer_id, created, model, fingerprint, usage=usage)
        self._shown = [Shown() for _ in range(choices)]
        self._heads = [self._common + b',"choices":[{"index":%d,"delta":' % index for index in range(choices)]
        self._content_heads = [b'data: %b{"content":' % head for head in self._heads]
        self._tail = b',"logprobs":null,"finish_reason":null}]' + self._no_usage + b"}"
        self._content_tail = b"}" + self._tail + b"\n\n"

    def begin(self, index: int) -> bytes:
        """Return the chunk with the role."""
        return frame(self._heads[index] + b'{"role":"assistant","content":""}' + self._tail)

    def piece(self, index: int, request: Request) -> bytes:
        """Take what a request has gained and return it as chunks."""
        text = request.take()
        if request.extras is not None or self._shown[index]:
            return self._rich(index, text, request.take_extras(), request.finish)
        return self.text(index, text) if text else b""

    def text(self, index: int, text: str) -> bytes:
        """Return a chunk with some of the answer."""
        # No `frame`: nothing here holds a line end. Joined, which takes half as long as to format.
        return b"".join((self._content_heads[index], json_line(text), self._content_tail))

    def finish(self, index: int, finish: Finish | None) -> bytes:
        """Return the chunk that says why the choice ended."""
        return self._chunk(index, b"{}", b"null", b'"%b"' % finish_reason(finish).encode())

    def _rich(self, index: int, text: str, extras: Extras, finish: Finish | None) -> bytes:
        """Return a chunk for each kind: no client has to expect two in one. Logprobs come with the first."""
        found = self._shown[index].take(extras, text, finish)
        if not (found or text or extras.reasoning or extras.tool_calls):
            return b""
        deltas: list[bytes] = []
        if extras.reasoning:
            deltas.append(b'{"reasoning_content":%b}' % json_line("".join(extras.reasoning)))
        if text or not (deltas or extras.tool_calls):
            deltas.append(b'{"content":%b}' % json_line(text))
        deltas += [b'{"tool_calls":[%b]}' % json_line(call) for call in _tool_pieces(extras.tool_calls)]
        logprobs = json_line(chat_logprobs(found)) if found else b"null"
        first, *others = deltas
        return self._chunk(index, first, logprobs) + b"".join(self._chunk(index, other) for other in others)

    def _chunk(self, index: int, delta: bytes, logprobs: bytes = b"null", finish: bytes = b"null") -> bytes:
        rest = b',"logprobs":%b,"finish_reason":%b}]%b}' % (logprobs, finish, self._no_usage)
        return frame(self._heads[index] + delta + rest)


def _tool_pieces(deltas: Sequence[ToolDelta]) -> Iterator[ToolCallPiece]:
    """Yield the pieces of calls, those that lie side by side joined."""
    piece: ToolCallPiece | None = None
    for delta in deltas:
        function = FunctionPiece(delta.name or UNSET, delta.arguments)
        if piece is not None and piece.index == delta.index and not delta.id:
            piece.function.arguments = f"{piece.function.arguments or ''}{delta.arguments}"
            continue
        if piece is not None:
            yield piece
        piece = ToolCallPiece(delta.index, function, delta.id or UNSET, "function" if delta.id else UNSET)
    if piece is not None:
        yield piece


class TextChunks(_Common):
    """`text_completion`s."""

    def __init__(
        self, answer_id: str, created: int, model: str, fingerprint: str, *, usage: bool, choices: int = 1
    ) -> None:
        super().__init__("text_completion", answer_id, created, model, fingerprint, usage=usage)
        self._logprobs = [LegacyWriter() for _ in range(choices)]
        self._shown = [Shown() for _ in range(choices)]
        self._head = self._common + b',"choices":[{"text":'

    def begin(self, _index: int) -> bytes:
        """Return nothing: there are no roles."""
        return b""

    def piece(self, index: int, request: Request) -> bytes:
        """Take what a request has gained and return it as one event."""
        text = request.take()
        logprobs: Sequence[TokenLogprob] = ()
        if request.extras is not None or self._shown[index]:
            logprobs = self._shown[index].take(request.take_extras(), text, request.finish)
        if not text and not logprobs:
            return b""
        shaped = json_line(self._logprobs[index].shape(logprobs)) if logprobs else b"null"
        return self._event(index, json_line(text), shaped, b"null")

    def text(self, index: int, text: str) -> bytes:
        """Return an event with some of the answer."""
        return self._event(index, json_line(text), b"null", b"null")

    def finish(self, index: int, finish: Finish | None) -> bytes:
        """Return the event that says why the choice ended."""
        return self._event(index, b'""', b"null", b'"%b"' % finish_reason(finish).encode())

    def _event(self, index: int, text: bytes, logprobs: bytes, finish: bytes) -> bytes:
        rest = b',"index":%d,"logprobs":%b,"finish_reason":%b}]%b}' % (index, logprobs, finish, self._no_usage)
        return frame(self._head + text + rest)
