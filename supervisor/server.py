"""The control socket: who may connect, and the first frame that says who it is."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from protocol import control
from protocol.channel import Channel, ChannelClosedError
from protocol.logs import event, exception_event
from protocol.messages import Decoder, MalformedMessageError
from supervisor.platform.base import Platform

_HELLO_S: Final = 5.0
_MAX_CONNECTIONS: Final = 256
_BACKLOG: Final = 128
_ACCEPT_RETRY_S: Final = 1.0


class Connection:
    """A connected peer: typed messages over a channel. `pid` is what the system says, not the peer."""

    def __init__(self, channel: Channel, pid: int, decoder: Decoder[control.ToSupervisor]) -> None:
        self.channel = channel
        self.pid = pid
        self._decoder = decoder

    async def receive(self) -> control.ToSupervisor:
        """Return the next message; raise `ChannelClosedError` or `MalformedMessageError`."""
        return self._decoder.decode(await self.channel.receive())


Handler = Callable[[control.Hello, Connection], Awaitable[None]]


class ControlServer:
    """Accepts connections at a path that only this user can reach, and hands each to `handler` after its hello."""

    def __init__(self, path: Path, platform: Platform, handler: Handler) -> None:
        self._path = path
        self._platform = platform
        self._handler = handler
        self._decoder = control.to_supervisor_decoder()
        self._sock: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._retry: asyncio.TimerHandle | None = None
        #: Conversations that ended with a bug of ours.
        self.failures = 0

    def open(self) -> None:
        """Start to accept. The caller holds the lock of the home, so a socket file in the way is a leftover."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.setblocking(False)
        old = os.umask(0o177)
        try:
            self._sock.bind(str(self._path))
        finally:
            os.umask(old)
        self._sock.listen(_BACKLOG)
        asyncio.get_running_loop().add_reader(self._sock, self._accept)

    async def close(self) -> None:
        """Stop accepting and end every conversation."""
        if self._retry is not None:
            self._retry.cancel()
        if self._sock is not None:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
            self._sock = None
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self) -> None:
        assert self._sock is not None
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors the socket stays readable: without a pause this would fill the log and a core.
            event("control_accept_failed", level="ERROR", reason=error.strerror)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._sock)
            self._retry = loop.call_later(_ACCEPT_RETRY_S, loop.add_reader, self._sock, self._accept)
            return
        try:
            uid, pid = self._platform.peer(sock)
        except OSError as error:  # gone again, or not to be told from others
            event("control_refused", level="WARNING", reason=error.strerror or str(error))
            sock.close()
            return
        if uid != os.geteuid() or len(self._tasks) >= _MAX_CONNECTIONS:
            event("control_refused", level="WARNING", uid=uid, connections=len(self._tasks))
            sock.close()
            return
        connection = Connection(Channel(sock, limit=control.MAX_FRAME_BYTES), pid, self._decoder)
        task = asyncio.get_running_loop().create_task(self._serve(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _task: connection.channel.close())  # also if it was cancelled before it began

    async def _serve(self, connection: Connection) -> None:
        try:
            hello = await asyncio.wait_for(connection.receive(), _HELLO_S)
            if isinstance(hello, control.Hello):
                await self._handler(hello, connection)
        except (ChannelClosedError, TimeoutError):
            pass
        except MalformedMessageError:
            event("control_protocol_error", level="WARNING", pid=connection.pid)
        except Exception as error:  # noqa: BLE001 - one peer's trouble must not end the supervisor
            self.failures += 1
            exception_event("internal_error", error, where="control")
