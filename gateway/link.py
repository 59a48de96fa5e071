"""The near end of the data plane, and the only module of the gateway that knows ZeroMQ.

A `Link` carries frames to and from one incarnation of one worker. It never reconnects: nothing said to one incarnation
may reach the next. asyncio-zmq is not used: a future and a task switch per frame would cost more than the frame.
"""

import asyncio
import itertools
import struct
from typing import Final, Protocol, cast

import zmq

from protocol.data import HIGH_WATER_MARK, MAX_FRAME_BYTES
from protocol.errors import LmxError
from protocol.logs import event

#: After so many frames other connections get a turn.
_FRAMES_PER_WAKE: Final = 256
#: A monitor event begins with its kind, 16 bits in the machine's order.
_EVENT_HEAD: Final = struct.Struct("=H")
_MONITORED: Final = (
    zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.DISCONNECTED
    | zmq.Event.CLOSED
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
)


class LinkOwner(Protocol):
    """Who is told what happens on a link. Nothing is called after `on_lost`."""

    def on_connected(self) -> None:
        """The worker has answered the handshake; frames can be sent."""

    def on_frame(self, frame: bytes | None, *, more: bool = False) -> None:
        """A frame has arrived; None stands for one that had more than one part. `more`: another one follows at once."""

    def on_lost(self, why: str) -> None:
        """The worker's end is closed, most likely because its process has ended. The link is closed too."""


class DataPlane:
    """Owns the ZeroMQ context; makes links."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._serial = itertools.count()

    def connect(self, endpoint: str, owner: LinkOwner) -> "Link":
        """Return a link that begins to connect; raise `LmxError` if the process has no descriptors left for it."""
        try:
            return Link(self._context, next(self._serial), endpoint, owner)
        except zmq.ZMQError as error:
            event("link_failed", level="ERROR", endpoint=endpoint, why=str(error))
            raise LmxError("server_busy", "The server has no sockets left; try again.") from None

    def close(self) -> None:
        """End the context. Every link must have been closed."""
        self._context.destroy(linger=0)


class Link:
    """A DEALER, and the monitor that tells whether anyone is at the other end. Owned by one event loop."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", serial: int, endpoint: str, owner: LinkOwner) -> None:
        self.closed = False
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._read_scheduled = False
        self._socket = context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.IMMEDIATE, 1)
        self._socket.set(zmq.RECONNECT_IVL, -1)
        self._socket.set(zmq.SNDHWM, HIGH_WATER_MARK)
        self._socket.set(zmq.RCVHWM, HIGH_WATER_MARK)
        self._socket.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        try:
            self._monitor = self._socket.get_monitor_socket(_MONITORED, f"inproc://monitor-{serial}")
        except zmq.ZMQError:
            self._socket.close(0)
            raise
        self._descriptors = [cast(int, sock.get(zmq.FD)) for sock in (self._monitor, self._socket)]
        for descriptor, read in zip(self._descriptors, (self._read_monitor, self._read), strict=True):
            self._loop.add_reader(descriptor, read)
        try:
            self._socket.connect(f"ipc://{endpoint}")
        except zmq.ZMQError as error:
            self._loop.call_soon(self._lose, f"connect: {error.strerror}")
        # What happened before the readers were added announces itself no more.
        self._loop.call_soon(self._read_monitor)

    def send(self, body: bytes) -> bool:
        """Send a frame; return False if the worker is gone or has stopped reading."""
        if self.closed:
            return False
        try:
            self._socket.send(body, zmq.NOBLOCK)
        except zmq.Again:
            # Perhaps it is gone and the monitor has not been read yet.
            self._read_monitor()
            return False
        except zmq.ZMQError as error:
            self._lose(f"send: {error.strerror}")
            return False
        # Sending may swallow the edge that announces a frame to read.
        if self._readable():
            self._schedule_read()
        return True

    def close(self) -> None:
        """Close without telling the owner."""
        if self.closed:
            return
        self.closed = True
        for descriptor in self._descriptors:
            self._loop.remove_reader(descriptor)
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)

    def _lose(self, why: str) -> None:
        if not self.closed:
            self.close()
            self._owner.on_lost(why)

    def _readable(self) -> bool:
        return bool(cast(int, self._socket.get(zmq.EVENTS)) & zmq.POLLIN)

    def _schedule_read(self) -> None:
        if not self._read_scheduled:
            self._read_scheduled = True
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        """Read until there is nothing: the descriptor signals only the change from nothing to something."""
        self._read_scheduled = False
        for _ in range(_FRAMES_PER_WAKE):
            # The owner may close the link on what it reads.
            if self.closed:
                return
            try:
                # Asked first: an exception for "nothing there" costs more than the question.
                if not self._readable():
                    return
                frame: bytes | None = self._socket.recv(zmq.NOBLOCK)
                while self._socket.get(zmq.RCVMORE):
                    frame = None
                    self._socket.recv(zmq.NOBLOCK)
                more = self._readable()
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                self._lose(f"receive: {error.strerror}")
                return
            self._owner.on_frame(frame, more=more)
        self._schedule_read()

    def _read_monitor(self) -> None:
        """Learn from libzmq whether the other process is there: its death shows within milliseconds."""
        while not self.closed:
            try:
                head = self._monitor.recv_multipart(zmq.NOBLOCK)[0]
            except zmq.Again:
                return
            (kind,) = _EVENT_HEAD.unpack_from(head)
            if kind == zmq.Event.HANDSHAKE_SUCCEEDED:
                self._owner.on_connected()
            else:
                self._read_the_rest()
                self._lose(str(zmq.Event(kind).name).lower())

    def _read_the_rest(self) -> None:
        """What arrived before the connection broke still counts: an answer may be complete in it."""
        for _ in range(HIGH_WATER_MARK // _FRAMES_PER_WAKE):
            self._read()
            if not self._read_scheduled:
                return
