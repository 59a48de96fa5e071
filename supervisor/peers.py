"""Conversations with workers and gateways over the control socket, and what becomes of processes nobody knows."""

import asyncio
import contextlib
import os
from collections.abc import Callable

from protocol import PROTOCOL_VERSION, control
from protocol.channel import ChannelClosedError
from protocol.logs import event
from protocol.messages import MalformedMessageError, encode
from protocol.states import Phase
from supervisor import events as ev
from supervisor.children import end_stranger
from supervisor.host import GATEWAY, Host
from supervisor.managed import Managed
from supervisor.server import Connection


class Peers:
    """Ties connections to slots. `catalog` returns what a gateway is to be told first.

    `handed_back(fd)` receives the listening socket of a gateway that outlived an earlier supervisor; `wanted(model)`
    is called when clients ask for a model that is loaded on demand.
    """

    def __init__(
        self,
        host: Host,
        catalog: Callable[[], control.Catalog],
        handed_back: Callable[[int], None],
        wanted: Callable[[str], None],
    ) -> None:
        self._host = host
        self._catalog = catalog
        self._handed_back = handed_back
        self._wanted = wanted
        self._strangers: set[asyncio.Task[None]] = set()
        self._decoder = control.to_supervisor_decoder()
        host.before_end = self.hear_rest

    async def worker(self, hello: control.WorkerHello, connection: Connection) -> None:
        """Serve one worker until its connection ends."""
        managed = self._host.find(hello.model)
        if managed is None or not self._belongs(managed, hello, connection):
            self._dismiss(hello.pid, connection, f"worker {hello.model}")
            return
        if hello.protocol != PROTOCOL_VERSION:
            managed.foreign = True
            return
        if hello.capabilities is not None:
            managed.capabilities = hello.capabilities
        managed.endpoint = hello.endpoint
        self._attach(managed, connection)
        if hello.capabilities is not None:  # it may have said so on a connection that broke
            self._host.feed(managed, ev.BecameReady(hello.load_s))
        await self._listen(managed, connection)

    async def gateway(self, hello: control.GatewayHello, connection: Connection) -> None:
        """Serve the gateway until its connection ends."""
        managed = self._gateway_slot(hello)
        descriptor = connection.channel.take_fd()
        if descriptor is not None:
            self._handed_back(descriptor)
        if not self._belongs(managed, hello, connection):
            self._dismiss(hello.pid, connection, "gateway")
            return
        if hello.protocol != PROTOCOL_VERSION:
            managed.foreign = True  # its requests may end before the next one takes its place
            return
        self._attach(managed, connection)
        connection.channel.send(encode(self._catalog()))
        await self._listen(managed, connection)

    def _gateway_slot(self, hello: control.GatewayHello) -> Managed:
        """Return the slot of this very gateway, which may be one that was replaced; else the present one."""
        for managed in self._host.slots.values():
            if not managed.model and managed.slot.incarnation == hello.incarnation and managed.slot.pid == hello.pid:
                return managed
        return self._host.slots[GATEWAY]

    async def spare(self, hello: control.SpareHello, connection: Connection) -> None:
        """Serve the spare until its connection ends."""
        if self._host.spare is None or not await self._host.spare.serve(hello, connection):
            self._dismiss(hello.pid, connection, "spare")

    def hear_rest(self, managed: Managed) -> None:
        """Hear what a process that has ended had said and we, being busy, had not read: that it got so far, and why."""
        for body in () if managed.channel is None else managed.channel.take_rest():
            with self._host.guard("end"), contextlib.suppress(MalformedMessageError):
                self._hear(managed, self._decoder.decode(body))

    async def close(self) -> None:
        """Wait for the strangers that are being ended."""
        await asyncio.gather(*self._strangers, return_exceptions=True)

    def _belongs(
        self, managed: Managed, hello: control.WorkerHello | control.GatewayHello, connection: Connection
    ) -> bool:
        """Return whether the peer is the slot's process, after adopting it if the slot has none."""
        # Who is at the other end is what the system says; a hello alone proves nothing.
        if hello.pid != connection.pid:
            return False
        if managed.slot.pid == hello.pid and managed.slot.incarnation == hello.incarnation:
            return True
        if managed.child is not None or not managed.slot.wanted:
            return False
        phase = hello.phase if isinstance(hello, control.WorkerHello) else Phase.IDLE
        return self._host.adopt(managed, hello.pid, hello.incarnation, phase)

    def _attach(self, managed: Managed, connection: Connection) -> None:
        if managed.channel is not None:
            managed.channel.close("replaced by a newer connection")
        managed.channel = connection.channel
        managed.tell(control.Welcome(PROTOCOL_VERSION, self._host.config.lifecycle.lease_s))
        self._host.feed(managed, ev.Helloed())

    async def _listen(self, managed: Managed, connection: Connection) -> None:
        try:
            while True:
                message = await connection.receive()
                if managed.channel is not connection.channel:
                    return
                self._hear(managed, message)
        except ChannelClosedError:
            if managed.channel is connection.channel:
                managed.channel = None

    def _hear(self, managed: Managed, message: control.ToSupervisor) -> None:
        feed = self._host.feed
        match message:
            case control.Loading(done, total):
                feed(managed, ev.Moved(done, total))
            case control.Ready(capabilities, load_s):
                managed.capabilities = capabilities
                feed(managed, ev.BecameReady(load_s))
            case control.GatewayReady():
                feed(managed, ev.BecameReady(0.0))
            case control.Heartbeat():
                managed.heartbeat = message
                feed(managed, ev.Beat(message.phase, message.step))
            case control.GatewayHeartbeat(draining=draining):
                feed(managed, ev.Beat(Phase.IDLE, 0))
                if draining:
                    self._host.relieve_gateway(managed)
            case control.Casualties(model, incarnation, requests):
                self._host.crashes.name_casualties(model, incarnation, requests)
            case control.Misbehaved(model, incarnation):
                self._host.condemn(model, incarnation)
            case control.Wanted(model):
                self._wanted(model)
            case control.Dying(_, words):
                managed.last_words = words
            case control.Drained():
                feed(managed, ev.HasDrained())
            case _:
                event("control_protocol_error", level="WARNING", pid=managed.slot.pid)

    def _dismiss(self, pid: int, connection: Connection, what: str) -> None:
        """A process that is not wanted, or of another version: it is asked to end, and then made to."""
        self._host.journal.write("stranger_dismissed", level="WARNING", what=what, pid=connection.pid)
        connection.channel.send(encode(control.Stop("not wanted here")))
        started = self._host.platform.process_started(connection.pid)
        if pid != connection.pid or started is None or connection.pid == os.getpid():
            return
        lifecycle = self._host.config.lifecycle
        task = asyncio.get_running_loop().create_task(
            end_stranger(self._host.platform, connection.pid, started, grace_s=lifecycle.stop_min_s)
        )
        self._strangers.add(task)
        task.add_done_callback(self._strangers.discard)
