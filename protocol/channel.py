"""One framed connection over a unix socket for asyncio, which can carry file descriptors beside frames.

asyncio's own transports drop descriptors, so this reads with `recv_fds`. Both directions are bounded: reading pauses
while the owner is behind, and a peer that does not read is closed.
"""

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_exponential

from protocol.framing import FrameBuffer, FrameTooLargeError, frame

_READ_BYTES: Final = 64 * 1024
_MAX_UNREAD_FRAMES: Final = 256
_MAX_UNSENT_BYTES: Final = 16 * 1024 * 1024
_MAX_FDS: Final = 4


class ChannelClosedError(Exception):
    """The connection is gone; the text says why."""


class Channel:
    """A connected, non-blocking unix socket that carries frames. Owned by one event loop."""

    def __init__(self, sock: socket.socket, *, limit: int) -> None:
        sock.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._buffer = FrameBuffer(limit)
        self._frames: deque[bytes] = deque()
        self._fds: deque[int] = deque()
        self._arrived = asyncio.Event()
        self._unsent = bytearray()
        self._reading = True
        self._closed_why: str | None = None
        self._loop.add_reader(sock, self._on_readable)

    @property
    def closed(self) -> bool:
        """Whether nothing more can be sent."""
        return self._closed_why is not None

    def peer_socket(self) -> socket.socket:
        """Return the socket, to ask the system who is at the other end."""
        return self._sock

    async def receive(self) -> bytes:
        """Return the next frame; raise `ChannelClosedError` once the peer is gone and all frames are read."""
        while not self._frames:
            if self._closed_why is not None:
                raise ChannelClosedError(self._closed_why)
            self._arrived.clear()
            await self._arrived.wait()
        frame_body = self._frames.popleft()
        if not self._reading and not self.closed and len(self._frames) < _MAX_UNREAD_FRAMES // 2:
            self._reading = True
            self._loop.add_reader(self._sock, self._on_readable)
        return frame_body

    def take_rest(self) -> list[bytes]:
        """Return the frames of a peer that has ended, as far as nobody has received them."""
        self._read_rest()
        rest = list(self._frames)
        self._frames.clear()
        return rest

    def take_fd(self) -> int | None:
        """Return the oldest file descriptor that arrived and was not taken; the caller owns it."""
        return self._fds.popleft() if self._fds else None

    def send(self, body: bytes, fds: tuple[int, ...] = ()) -> None:
        """Send a frame now or as soon as the peer reads; raise `ChannelClosedError` if it is gone."""
        if self._closed_why is not None:
            raise ChannelClosedError(self._closed_why)
        data = frame(body)
        if fds:
            # Descriptors ride on the first byte; they are sent only on a fresh connection, so nothing is queued.
            sent = self._try(lambda: socket.send_fds(self._sock, [data], list(fds)))
            data = data[sent:]
        elif not self._unsent:
            sent = self._try(lambda: self._sock.send(data))
            data = data[sent:]
        if not data or self._closed_why is not None:
            return
        if not self._unsent:
            self._loop.add_writer(self._sock, self._on_writable)
        self._unsent += data
        if len(self._unsent) > _MAX_UNSENT_BYTES:
            self.close("the peer does not read")

    def close(self, why: str = "closed") -> None:
        """Close at once; frames already received can still be read."""
        if self._closed_why is not None:
            return
        self._closed_why = why
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        while self._fds:
            os.close(self._fds.popleft())
        self._arrived.set()

    def _try(self, send: Callable[[], int]) -> int:
        try:
            return send()
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._read_rest()  # what it said before it went may still lie there
            self.close(error.strerror or "send failed")
            return 0

    def _read_rest(self) -> None:
        known = -1
        while not self.closed and len(self._frames) != known:
            known = len(self._frames)
            self._on_readable()

    def _on_readable(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, _READ_BYTES, _MAX_FDS)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(error.strerror or "receive failed")
            return
        self._keep(fds)
        if not data:
            self.close("the peer closed the connection")
            return
        try:
            self._frames.extend(self._buffer.feed(data))
        except FrameTooLargeError:
            self.close("the peer sent a frame that is too large")
            return
        if len(self._frames) > _MAX_UNREAD_FRAMES:
            self._reading = False
            self._loop.remove_reader(self._sock)
        self._arrived.set()

    def _keep(self, fds: list[int]) -> None:
        """Hold descriptors until they are taken; more than a few at once would fill our own table."""
        for descriptor in fds:
            if len(self._fds) < _MAX_FDS:
                os.set_inheritable(descriptor, False)
                self._fds.append(descriptor)
            else:
                os.close(descriptor)

    def _on_writable(self) -> None:
        sent = self._try(lambda: self._sock.send(self._unsent))
        del self._unsent[:sent]
        if not self._unsent and self._closed_why is None:
            self._loop.remove_writer(self._sock)


async def dial(path: Path, *, limit: int, within_s: float) -> Channel:
    """Connect to the socket at `path`, trying again for up to `within_s`; raise `OSError` when it stays absent."""
    async for attempt in AsyncRetrying(
        retry=retry_if_exception_type(OSError),
        stop=stop_after_delay(within_s),
        wait=wait_exponential(multiplier=0.02, max=0.5),
        reraise=True,
    ):
        with attempt:
            return Channel(_connect(path), limit=limit)
    raise AssertionError("unreachable")


def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)  # a listener with a full backlog would stop the whole loop
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return sock
