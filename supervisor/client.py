"""The command line's side of the control socket: blocking, one request at a time, every wait with a deadline."""

import os
import socket
import time
from collections.abc import Iterator
from typing import Final

from protocol import PROTOCOL_VERSION, __version__, control
from protocol.framing import FrameBuffer, FrameTooLargeError, frame
from protocol.messages import MalformedMessageError, Message, encode
from protocol.paths import Home

_CONNECT_S: Final = 5.0
_READ_BYTES: Final = 64 * 1024


class UnreachableError(Exception):
    """No supervisor answers; the text says so in words."""


class WaitedTooLongError(Exception):
    """The supervisor did not finish in time."""


class Client:
    """One connection to the supervisor of a home."""

    def __init__(self, home: Home) -> None:
        self._buffer = FrameBuffer(control.MAX_FRAME_BYTES)
        self._decoder = control.from_supervisor_decoder()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(_CONNECT_S)
        try:
            self._sock.connect(os.fspath(home.control_socket))
            self._send(control.CliHello(PROTOCOL_VERSION, __version__))
        except (OSError, UnreachableError) as error:
            self._sock.close()
            msg = f"no supervisor answers on {home.control_socket} ({_why(error)})"
            raise UnreachableError(msg) from None

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    def ask(self, request: Message, *, within_s: float) -> Iterator[control.FromSupervisor]:
        """Send a request and yield what comes back, until the caller has what it wants."""
        end = time.monotonic() + within_s
        self._send(request)
        while True:
            yield from self._receive(end)

    def status(self, *, within_s: float = _CONNECT_S) -> bytes:
        """Return the status document as JSON."""
        for message in self.ask(control.StatusRequest(), within_s=within_s):
            if isinstance(message, control.StatusReply):
                return message.document
        raise AssertionError("unreachable")

    def wait_closed(self, *, within_s: float) -> None:
        """Return when the supervisor has hung up."""
        end = time.monotonic() + within_s
        try:
            while True:
                list(self._receive(end))
        except UnreachableError:
            return

    def _send(self, message: Message) -> None:
        try:
            self._sock.sendall(frame(encode(message)))
        except OSError as error:
            msg = f"the supervisor hung up ({_why(error)})"
            raise UnreachableError(msg) from None

    def _receive(self, end: float) -> list[control.FromSupervisor]:
        left = end - time.monotonic()
        if left <= 0:
            msg = "the supervisor did not answer in time"
            raise WaitedTooLongError(msg)
        self._sock.settimeout(left)
        try:
            data = self._sock.recv(_READ_BYTES)
            if not data:
                msg = "the supervisor hung up before it was done"
                raise UnreachableError(msg)
            return [self._decoder.decode(body) for body in self._buffer.feed(data)]
        except TimeoutError:
            msg = "the supervisor did not answer in time"
            raise WaitedTooLongError(msg) from None
        except (OSError, MalformedMessageError, FrameTooLargeError) as error:
            msg = f"the supervisor's answer cannot be read ({type(error).__name__}): is it another version?"
            raise UnreachableError(msg) from None


def _why(error: Exception) -> str:
    """Return the system's words; a timeout and a path that is too long have none of their own."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
