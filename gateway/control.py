"""The gateway's end of the control plane: introduces itself to every supervisor it finds and does what it is told."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from protocol import PROTOCOL_VERSION, __version__
from protocol.channel import Channel, ChannelClosedError, dial
from protocol.control import (
    MAX_FRAME_BYTES,
    Casualties,
    Catalog,
    Drain,
    Drained,
    GatewayHeartbeat,
    GatewayHello,
    GatewayReady,
    Misbehaved,
    Ping,
    Stop,
    ToGateway,
    Wanted,
    Welcome,
    from_supervisor_decoder,
)
from protocol.logs import event
from protocol.messages import MalformedMessageError, encode
from protocol.standstill import Standstill

#: Between two connections that ended at once; `dial` backs off by itself while the socket is absent.
_REDIAL_S: Final = 0.5
_DIAL_S: Final = 3600.0
_WELCOME_S: Final = 5.0


class _NotOurSupervisorError(Exception):
    """What answered cannot be worked with; the text says why."""


class Lease:
    """How long a gateway goes on without a supervisor. Pure: time is an argument.

    `slept_s` is how late a check may come; later means that the machine or this process stood still, and a
    supervisor had no chance to be heard.
    """

    def __init__(self, lease_s: float, slept_s: float, now: float) -> None:
        self.lease_s = lease_s
        self._standstill = Standstill(slept_s, now)
        self._heard_at = now

    def renew(self, now: float) -> None:
        """A supervisor was heard."""
        self._heard_at = now

    def expired(self, now: float, interval_s: float) -> bool:
        """Return whether the lease is over; to be asked every `interval_s`."""
        self._standstill.rested(interval_s)
        if self._standstill.look(now):
            self._heard_at = now
        return now - self._heard_at > self.lease_s


class Orders(Protocol):
    """What the supervisor can make a gateway do."""

    def new_catalog(self, catalog: Catalog) -> None:
        """Serve these models from now on."""

    def drain(self, grace_s: float, *, hand_over: bool) -> None:
        """Take no more requests, or only no more connections; call `ControlClient.drained` when none is left."""

    def vitals(self, status: bytes) -> None:
        """Take note of the supervisor's view of everything, as JSON."""

    def stop(self, reason: str) -> None:
        """End now."""


class ControlClient:
    """Keeps a connection to the supervisor, whichever it is, for as long as `run` runs."""

    def __init__(
        self,
        *,
        path: Path,
        incarnation: int,
        listen_fd: int,
        heartbeat_s: float,
        lease: Lease,
        orders: Orders,
        heartbeat: Callable[[], GatewayHeartbeat],
        accepting: asyncio.Event,
    ) -> None:
        self._path = path
        self._hello = GatewayHello(PROTOCOL_VERSION, incarnation, os.getpid(), __version__)
        self._listen_fd = listen_fd
        self._heartbeat_s = heartbeat_s
        self._lease = lease
        self._orders = orders
        self._heartbeat = heartbeat
        self._accepting = accepting
        self._decoder = from_supervisor_decoder()
        self._channel: Channel | None = None
        self._drained = False

    async def run(self) -> None:
        """Connect, obey, and connect again, until cancelled."""
        while True:
            try:
                channel = await dial(self._path, limit=MAX_FRAME_BYTES, within_s=_DIAL_S)
            except OSError:
                continue
            try:
                await self._talk(channel)
            except (ChannelClosedError, MalformedMessageError, _NotOurSupervisorError, TimeoutError) as error:
                event("supervisor_lost", level="WARNING", why=type(error).__name__, detail=str(error))
            finally:
                self._channel = None
                channel.close()
            await asyncio.sleep(_REDIAL_S)

    def drained(self) -> None:
        """Report that no request is left, to this supervisor or, if none is there, to the next one."""
        self._drained = True
        if self._channel is not None and not self._channel.closed:
            self._channel.send(encode(Drained()))

    def report(self, report: Casualties | Misbehaved | Wanted) -> None:
        """Tell what became of a worker; nobody needs to know later if no supervisor is there."""
        if self._channel is not None and not self._channel.closed:
            self._channel.send(encode(report))

    async def _talk(self, channel: Channel) -> None:
        # The listening socket goes along: a supervisor that did not open it can hand it to the next gateway.
        channel.send(encode(self._hello), fds=(self._listen_fd,))
        async with asyncio.timeout(_WELCOME_S):
            welcome = await self._next(channel)
        if not isinstance(welcome, Welcome):
            raise _NotOurSupervisorError(f"it began with {type(welcome).__name__}")
        if welcome.protocol != PROTOCOL_VERSION:
            raise _NotOurSupervisorError(f"it speaks protocol {welcome.protocol}, this is {PROTOCOL_VERSION}")
        self._lease.lease_s = welcome.lease_s
        self._channel = channel
        event("supervisor_found")
        beating = asyncio.create_task(self._beat(channel))
        try:
            await self._obey(channel)
        finally:
            beating.cancel()

    async def _obey(self, channel: Channel) -> None:
        introduced = False
        while True:
            message = await self._next(channel)
            match message:
                case Catalog():
                    self._orders.new_catalog(message)
                    if not introduced:
                        introduced = True
                        await self._accepting.wait()
                        channel.send(encode(GatewayReady()))
                        if self._drained:
                            channel.send(encode(Drained()))
                case Drain(grace_s=grace_s, hand_over=hand_over):
                    self._orders.drain(grace_s, hand_over=hand_over)
                case Stop(reason=reason):
                    self._orders.stop(reason)
                case Ping(status=status):
                    if status:
                        self._orders.vitals(status)
                case Welcome():
                    pass

    async def _next(self, channel: Channel) -> ToGateway:
        message = self._decoder.decode(await channel.receive())
        if not isinstance(message, ToGateway):
            raise _NotOurSupervisorError(f"it sent {type(message).__name__}")
        self._lease.renew(asyncio.get_running_loop().time())
        return message

    async def _beat(self, channel: Channel) -> None:
        """Send a heartbeat each period. It comes from the event loop that serves requests, so it proves that one."""
        while not channel.closed:
            channel.send(encode(self._heartbeat()))
            await asyncio.sleep(self._heartbeat_s)
