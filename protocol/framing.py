"""Frames on the control socket: a 4-byte big-endian length, then that many bytes of one message."""

import struct
from collections.abc import Iterator
from typing import Final

_LENGTH: Final = struct.Struct(">I")


class FrameTooLargeError(Exception):
    """The peer announced a frame longer than the limit; the connection can only be closed."""


def frame(body: bytes) -> bytes:
    """Return `body` with its length in front."""
    return _LENGTH.pack(len(body)) + body


class FrameBuffer:
    """Cuts a byte stream into frames, without doing any IO itself. Holds at most one frame and one read."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add bytes and yield each frame that is now whole; raise `FrameTooLargeError` before buffering one."""
        self._data += data
        while len(self._data) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data)
            if length > self._limit:
                raise FrameTooLargeError(length)
            end = _LENGTH.size + length
            if len(self._data) < end:
                return
            body = bytes(self._data[_LENGTH.size : end])
            del self._data[:end]
            yield body
