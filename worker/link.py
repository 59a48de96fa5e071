"""The data-plane socket of a worker, and the waiting for everything the IO thread listens to. IO thread only.

The only module of the worker that imports zmq.
"""

import contextlib
import time
from pathlib import Path
from typing import Final

import zmq

from protocol.data import HIGH_WATER_MARK, MAX_FRAME_BYTES, Step
from protocol.logs import event
from protocol.messages import encode
from worker.outbox import Outbox, OutboxFullError
from worker.requests import Reply

#: A full pipe is tried again after this long. ZeroMQ has no event for "this one peer of a ROUTER has room again".
RETRY_S: Final = 0.02
_IPC: Final = "ipc://"
_NOTHING: Final[tuple[set[bytes], list[tuple[bytes, int]]]] = (set(), [])


class DataLink:
    """A bound ROUTER. Sending never blocks and never raises; what it finds out is collected for `take_losses`."""

    def __init__(self, endpoint: str, incarnation: int) -> None:
        self._path = Path(endpoint.removeprefix(_IPC))
        self._incarnation = incarnation
        self._context = zmq.Context(io_threads=1)
        self._router = self._context.socket(zmq.ROUTER)
        # Sending to a gateway that is gone fails at once instead of vanishing.
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        self._router.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        self._router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._poller = zmq.Poller()
        self._outboxes: dict[bytes, Outbox] = {}
        self._sent_to: set[bytes] = set()
        self._gone: set[bytes] = set()
        self._slow: list[tuple[bytes, int]] = []

    def bind(self) -> None:
        """Bind; raise `OSError` if the path cannot be used."""
        try:
            self._router.bind(f"{_IPC}{self._path}")
        except zmq.ZMQError as error:
            raise OSError(error.errno, error.strerror) from None
        self._poller.register(self._router, zmq.POLLIN)

    # -- waiting ----------------------------------------------------------------------------------------------

    def watch(self, fd: int, *, write: bool = False) -> None:
        """Wake `wait` also for this descriptor: when it is readable, and on request when it is writable."""
        self._poller.register(fd, zmq.POLLIN | (zmq.POLLOUT if write else 0))

    def unwatch(self, fd: int) -> None:
        """Forget a descriptor, before it is closed."""
        with contextlib.suppress(KeyError):
            self._poller.unregister(fd)

    def wait(self, timeout_s: float) -> tuple[bool, set[int]]:
        """Wait for anything; return whether the data socket is readable, and the descriptors with events."""
        ready = self._poller.poll(max(0, int(timeout_s * 1000 + 0.999)))
        fds = {source for source, _ in ready if source is not self._router}
        return len(fds) < len(ready), fds

    # -- messages ---------------------------------------------------------------------------------------------

    def receive(self) -> tuple[bytes, bytes] | None:
        """Return (gateway, frame), or None when nothing is there. A frame of another shape comes as an empty one."""
        try:
            parts = self._router.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return (parts[0], parts[1]) if len(parts) == 2 else (parts[0], b"")

    def send(self, gateway: bytes, message: Reply) -> None:
        """Send now, or keep the message until there is room."""
        if gateway in self._gone:
            return
        outbox = self._outboxes.get(gateway)
        if outbox is None:
            if self._try(gateway, message):
                return
            outbox = self._outboxes[gateway] = Outbox()
        try:
            self._slow += [(gateway, rid) for rid in outbox.add(message)]
        except OutboxFullError:
            self._lose(gateway, "unread")

    def probe(self, gateways: set[bytes], step: int) -> None:
        """See whether gateways that got nothing since the last probe are there: a prefill may take a minute."""
        for gateway in gateways - self._sent_to:
            if gateway not in self._outboxes:
                self.send(gateway, Step(self._incarnation, step, []))
        self._sent_to.clear()

    def take_losses(self) -> tuple[set[bytes], list[tuple[bytes, int]]]:
        """Return gateways that are gone, and (gateway, rid) of answers with too much unsent, since the last call."""
        if not self._gone and not self._slow:
            return _NOTHING
        losses = self._gone, self._slow
        self._gone, self._slow = set(), []
        return losses

    def forget(self, gateway: bytes, rid: int) -> None:
        """Drop unsent text of an aborted request."""
        outbox = self._outboxes.get(gateway)
        if outbox is not None:
            outbox.forget(rid)

    @property
    def blocked(self) -> bool:
        """Whether something waits for room; then call `retry` every `RETRY_S`."""
        return bool(self._outboxes)

    def retry(self) -> None:
        """Send what waited and has room now."""
        for gateway, outbox in list(self._outboxes.items()):
            while outbox and gateway not in self._gone and self._try(gateway, outbox.head(self._incarnation)):
                outbox.pop()
            if not outbox or gateway in self._gone:
                self._outboxes.pop(gateway, None)

    def _try(self, gateway: bytes, message: Reply) -> bool:
        """Return whether the message needs no further care: sent, or its gateway gone."""
        try:
            self._router.send_multipart([gateway, encode(message)], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError:  # EHOSTUNREACH; anything else is no better
            self._lose(gateway, "unreachable")
            return True
        self._sent_to.add(gateway)
        return True

    def _lose(self, gateway: bytes, why: str) -> None:
        event("gateway_gone", level="WARNING", why=why)
        self._gone.add(gateway)
        self._outboxes.pop(gateway, None)

    # -- the end ----------------------------------------------------------------------------------------------

    def close(self, within_s: float) -> None:
        """Send what can be sent in that time, close, and remove the socket file."""
        until = time.monotonic() + within_s
        while self.blocked and (left := until - time.monotonic()) > 0:
            time.sleep(min(RETRY_S, left))
            self.retry()
        self._router.close(linger=max(0, int((until - time.monotonic()) * 1000)))
        self._context.term()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
