"""Reading along with a request's body, for what has to be known before it is worked on: the model and the tokens."""

from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from starlette.types import Message, Receive

from protocol.errors import LmxError

#: Bytes of a body that make about one token.
_BYTES_PER_TOKEN: Final = 4
#: Tokens of an answer whose client did not say how long it may get.
_ANSWER_TOKENS: Final = 512
_NO_ANSWER: Final = frozenset({"/embeddings", "/rerank", "/tokenize", "/detokenize"})


#: A name or a number has fewer bytes, however it is escaped; what has more is neither.
_SMALL_BYTES: Final = 8192
_NOTHING: Final = msgspec.Raw(b"null")


class Wanted(msgspec.Struct):
    """The few fields that are looked at, unread; of a field that is there twice the last counts, as everywhere here."""

    model: msgspec.Raw = _NOTHING
    max_tokens: msgspec.Raw = _NOTHING
    max_completion_tokens: msgspec.Raw = _NOTHING
    n: msgspec.Raw = _NOTHING

    @property
    def model_name(self) -> str:
        """The model, "" for what is no name."""
        found = _small(self.model)
        return found if isinstance(found, str) else ""


_DECODER: Final = msgspec.json.Decoder(Wanted)


def wanted_of(body: bytes) -> Wanted | None:
    """Return what a body asks for; None if it is no JSON object."""
    try:
        return _DECODER.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def estimate(wanted: Wanted | None, size: int, path: str, limit: int) -> int:
    """Return how many tokens a request may take, prompt and answer together.

    Never more than `limit`, unless the answer alone may be longer than that: such a request can never be granted.
    """
    answer = 0 if path in _NO_ANSWER else min(_ANSWER_TOKENS, limit)
    if wanted is not None:
        asked = _number(wanted.max_completion_tokens) or _number(wanted.max_tokens)
        answer = (asked or answer) * (_number(wanted.n) or 1)
    return max(answer, min(limit, answer + size // _BYTES_PER_TOKEN + 1))


def _small(raw: msgspec.Raw) -> object:
    """Return a value; None for what is so large that it cannot be one that is looked for."""
    if len(memoryview(raw)) > _SMALL_BYTES:
        return None
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _number(raw: msgspec.Raw) -> int:
    value = _small(raw)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


class Inspected:
    """A `receive` that shows the whole body to `check` before its last part goes on. `check` may raise `LmxError`."""

    def __init__(self, receive: Receive, limit: int, check: Callable[[bytes], Awaitable[None]]) -> None:
        self._receive = receive
        self._limit = limit
        self._check = check
        self._parts: list[bytes] = []
        self._size = 0
        self._done = False

    async def __call__(self) -> Message:
        """Return the next message."""
        message = await self._receive()
        if self._done or message["type"] != "http.request":
            return message
        part = message.get("body", b"")
        self._size += len(part)
        if self._size > self._limit:
            raise LmxError("body_too_large", f"The body is larger than {self._limit} bytes.")
        self._parts.append(part)
        if not message.get("more_body", False):
            self._done = True
            body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts.clear()
            await self._check(body)
        return message
