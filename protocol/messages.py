"""The base of every message on both planes, and how one is encoded.

Messages are msgpack arrays with an integer tag in front. Fields are only ever *appended*, with a default, so that
a reader of one version understands a writer of the next; the golden bytes in `tests/contract` hold that promise.
"""

from typing import Any, Generic, TypeVar, cast

import msgspec

UnionT = TypeVar("UnionT")


class Message(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One message: positional on the wire, immutable in memory, not tracked by the cycle collector."""


class MalformedMessageError(Exception):
    """Bytes of a peer that are not a message of the expected union. The text never quotes the bytes."""


def encode(message: Message) -> bytes:
    """Return the msgpack form of one message."""
    return msgspec.msgpack.encode(message)


class Decoder(Generic[UnionT]):
    """Decodes the messages of one union; every failure is a `MalformedMessageError`.

    `union` is the type expression (`Hello | Bye`); pass it as `Decoder[Hello | Bye](Hello | Bye)`.
    """

    def __init__(self, union: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(union)

    def decode(self, frame: bytes | memoryview) -> UnionT:
        """Return the message in `frame`; raise `MalformedMessageError` for anything else."""
        try:
            return cast(UnionT, self._decoder.decode(frame))
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise MalformedMessageError(type(error).__name__) from None
