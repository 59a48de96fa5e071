"""The worker's end of the control socket: dials, introduces itself, dials again. Never blocks. IO thread only."""

import contextlib
import random
import socket
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Final

from protocol.control import MAX_FRAME_BYTES, FromSupervisor, ToWorker, from_supervisor_decoder
from protocol.framing import FrameBuffer, FrameTooLargeError, frame
from protocol.logs import event
from protocol.messages import MalformedMessageError, Message, encode

_READ_BYTES: Final = 64 * 1024
_MAX_UNSENT_BYTES: Final = 1024 * 1024
_FIRST_DELAY_S: Final = 0.02
_MAX_DELAY_S: Final = 0.5


class ControlClient:
    """A connection that is there or is being made again.

    `hello` is called for each new connection and returns what to say first. What is sent while there is no
    connection is dropped: the next hello and heartbeat tell the whole state. `heard_at` is when the supervisor last
    said anything (monotonic seconds); a worker that is started without one gets a full lease.
    """

    def __init__(self, path: str, hello: Callable[[], list[Message]], now: float) -> None:
        self._path = path
        self._hello = hello
        self._sock: socket.socket | None = None
        self._frames = FrameBuffer(MAX_FRAME_BYTES)
        self._unsent = bytearray()
        self._decoder = from_supervisor_decoder()
        self._delay_s = _FIRST_DELAY_S
        self.heard_at = now
        #: When to dial next, if there is no connection.
        self.dial_at = now

    @property
    def connected(self) -> bool:
        """Whether somebody is at the other end, as far as we know."""
        return self._sock is not None

    @property
    def fileno(self) -> int | None:
        """The descriptor to poll, None without a connection."""
        return None if self._sock is None else self._sock.fileno()

    @property
    def wants_write(self) -> bool:
        """Whether to poll for room, too."""
        return bool(self._unsent)

    def dial(self, now: float) -> None:
        """Try to connect; on failure try again later, 20 ms to 0.5 s apart."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(self._path)
        except OSError:  # absent, not listening, backlog full: all the same to us
            sock.close()
            self._retry_later(now)
            return
        self._sock = sock
        self._frames = FrameBuffer(MAX_FRAME_BYTES)
        self._unsent.clear()
        for message in self._hello():
            self.send(message)

    def send(self, message: Message) -> None:
        """Send now or as soon as there is room; nothing without a connection."""
        if self._sock is None:
            return
        self._unsent += frame(encode(message))
        self.flush()
        if len(self._unsent) > _MAX_UNSENT_BYTES:
            self.close("the supervisor does not read")

    def flush(self) -> None:
        """Send what there is room for."""
        if self._sock is None or not self._unsent:
            return
        try:
            sent = self._sock.send(self._unsent)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(error.strerror or "send failed")
            return
        del self._unsent[:sent]

    def receive(self, now: float) -> Iterator[ToWorker]:
        """Yield the messages that have arrived."""
        data = self._read()
        if not data:
            return
        self.heard_at = now
        try:
            for body in self._frames.feed(data):
                message: FromSupervisor = self._decoder.decode(body)
                if isinstance(message, ToWorker):
                    self._delay_s = _FIRST_DELAY_S
                    yield message
        except (FrameTooLargeError, MalformedMessageError):
            self.close("the supervisor sent something unreadable")

    def finish(self, within_s: float) -> None:
        """End the connection so that the last words are read.

        Closed at once, with the supervisor's welcome still on its way, the other side would see a broken pipe before
        it has read them. So only our direction is closed, and the supervisor closes its own when it has read all.
        """
        sock, self._sock = self._sock, None
        if sock is None:
            return
        with contextlib.suppress(OSError), sock:
            sock.settimeout(within_s)
            sock.sendall(self._unsent)
            sock.shutdown(socket.SHUT_WR)
            until = monotonic() + within_s
            while sock.recv(_READ_BYTES) and monotonic() < until:
                pass

    def close(self, why: str) -> None:
        """Drop the connection; `dial` makes the next one."""
        if self._sock is None:
            return
        event("control_closed", level="WARNING", why=why)
        with contextlib.suppress(OSError):
            self._sock.close()
        self._sock = None
        self._unsent.clear()
        self._retry_later(monotonic())

    def _read(self) -> bytes:
        if self._sock is None:
            return b""
        try:
            data = self._sock.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return b""
        except OSError as error:
            self.close(error.strerror or "receive failed")
            return b""
        if not data:
            self.close("the supervisor closed the connection")
        return data

    def _retry_later(self, now: float) -> None:
        # Jitter, so that the workers of one host do not all dial in the same instant.
        self.dial_at = now + self._delay_s * random.uniform(0.75, 1.25)  # noqa: S311
        self._delay_s = min(self._delay_s * 2, _MAX_DELAY_S)
