"""The life of a gateway process: what it consists of, how it drains, with which code it exits."""

import asyncio
import os
import signal
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

from gateway.app import Parts, build_app
from gateway.audit import Audit
from gateway.audit_store import AuditStore
from gateway.catalog import CatalogView
from gateway.control import ControlClient, Lease
from gateway.exposition import Scene
from gateway.numbers import Numbers
from gateway.pool import Report, WorkerPool
from gateway.server import Server
from gateway.traffic import Traffic
from gateway.vitals import VitalsView
from protocol.control import Catalog, GatewayHeartbeat
from protocol.errors import LmxError
from protocol.logs import event, exception_event
from protocol.spec import GatewaySpec
from protocol.states import WorkerExit
from protocol.tracing import make_tracer

_LEASE_CHECKS: Final = 20
_MAX_LEASE_CHECK_S: Final = 1.0
#: Last rows are on their way to a file that somebody may have locked.
_AUDIT_CLOSE_S: Final = 2.0
#: A client that goes on at once does so on the connection it has; one that pauses longer opens another.
_LET_GO_AFTER_S: Final = 1.0
_LET_GO_CHECK_S: Final = 0.05


class Service:
    """One gateway. Owned by the event loop it is made in; `gateway.control.Orders` is what a supervisor may ask."""

    def __init__(self, spec: GatewaySpec, listener: socket.socket) -> None:
        self._spec = spec
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._catalog = CatalogView()
        self._numbers = Numbers()
        self._vitals = VitalsView()
        self._pool = WorkerPool(spec.gateway, self._catalog, self._report, self._numbers)
        self._traffic = Traffic()
        self._accepting = asyncio.Event()
        self._exit: asyncio.Future[int] = self._loop.create_future()
        self._drains: set[asyncio.Task[None]] = set()
        self._tracer = make_tracer(spec.tracing, "lmx-gateway")
        store = AuditStore(Path(spec.audit_file), spec.audit) if spec.audit_file else None
        self._audit = Audit(store)
        scene, numbers = self._scene, self._numbers
        parts = Parts(self._catalog, self._pool, self._traffic, numbers, self._vitals, scene, self._audit, self._tracer)
        app = build_app(spec, parts)
        self._server = Server(app, self._accepting.set, spec.security)
        lifecycle = spec.lifecycle
        self._lease = Lease(lifecycle.lease_s, lifecycle.slept_s, self._loop.time())
        self._control = ControlClient(
            path=Path(spec.control_socket),
            incarnation=spec.incarnation,
            # One of our own: the server closes its when it stops to accept, and the next supervisor may want it still.
            listen_fd=os.dup(listener.fileno()),
            heartbeat_s=lifecycle.heartbeat_s,
            lease=self._lease,
            orders=self,
            heartbeat=self._heartbeat,
            accepting=self._accepting,
        )

    async def run(self) -> int:
        """Serve until told or forced to stop; return the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_signal)
        self._loop.add_signal_handler(signal.SIGUSR2, self._on_hand_over)
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener]), name="serving")
        control = asyncio.create_task(self._control.run(), name="control")
        lease = asyncio.create_task(self._watch_lease(), name="lease")
        self._audit.start()
        event("gateway_started", incarnation=self._spec.incarnation)
        try:
            running: list[asyncio.Future[Any]] = [serving, control, lease, self._exit]
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            code = self._exit_code(serving, control, lease)
            self._traffic.drain()
            self._pool.fail_requests(_stopping())
            self._server.should_exit = True
            await asyncio.wait({serving})
        finally:
            for task in (control, lease, *self._drains):
                task.cancel()
            await asyncio.gather(control, lease, *self._drains, return_exceptions=True)
            self._pool.close()
            self._audit.close(_AUDIT_CLOSE_S)
            await asyncio.to_thread(self._tracer.close)
        event("gateway_stopped", code=code)
        return code

    # -- what a supervisor may ask ------------------------------------------------------------------------------

    def new_catalog(self, catalog: Catalog) -> None:
        """Serve these models from now on."""
        self._catalog.replace(catalog)
        self._pool.apply(catalog)

    def vitals(self, status: bytes) -> None:
        """Keep the supervisor's view of everything, for health and metrics."""
        self._vitals.take(status)

    def drain(self, grace_s: float, *, hand_over: bool) -> None:
        """Take no more requests and say when none is left; then wait to be stopped.

        In a hand-over new connections are the next gateway's; what comes on those that are open is still answered.
        """
        if hand_over:
            self._start_handing_over(grace_s, None)
        else:
            self._start_drain(grace_s, None)

    def stop(self, reason: str) -> None:
        """End now; what still runs is failed."""
        event("gateway_told_to_stop", reason=reason)
        self._end(WorkerExit.ASKED)

    def _report(self, report: Report) -> None:
        self._control.report(report)

    # -- ending -------------------------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        """Drain on the first signal, end on the second."""
        event("sigterm_received")
        if self._traffic.draining:
            self._end(WorkerExit.ASKED)
        else:
            self._start_drain(self._spec.lifecycle.drain_s, WorkerExit.ASKED)

    def _on_hand_over(self) -> None:
        """A supervisor of another protocol version, whose messages would make no sense, has started the next one."""
        self._start_handing_over(self._spec.lifecycle.drain_s, WorkerExit.ASKED)

    def _start_handing_over(self, grace_s: float, code: WorkerExit | None) -> None:
        event("gateway_handing_over", grace_s=grace_s, running=self._traffic.running)
        self._server.stop_accepting()
        self._traffic.close()
        self._watch_drain(self._let_go(grace_s), code)

    def _start_drain(self, grace_s: float, code: WorkerExit | None) -> None:
        event("gateway_draining", grace_s=grace_s, running=self._traffic.running)
        self._traffic.drain()
        self._watch_drain(self._traffic.idle(grace_s), code)

    def _watch_drain(self, emptied: Coroutine[Any, Any, bool], code: WorkerExit | None) -> None:
        task = self._loop.create_task(self._drain(emptied, code))
        self._drains.add(task)
        task.add_done_callback(self._drains.discard)

    async def _let_go(self, grace_s: float) -> bool:
        """Return whether every connection has gone in time.

        Between "nothing runs" and the order to stop a request may come on a connection kept alive. So the open ones
        get time for one more response, which closes them, and what is still open after a silence is closed.
        """
        deadline = self._loop.time() + grace_s
        quiet_since = self._loop.time()
        gone = 0
        silent = False
        # Twice: one that was accepted a moment ago is no connection of the server before some turns of the loop.
        while gone < 2 and self._loop.time() < deadline:
            await asyncio.sleep(_LET_GO_CHECK_S)
            gone = 0 if self._server.connection_count() else gone + 1
            if self._traffic.running:
                quiet_since = self._loop.time()
                silent = False
            elif self._loop.time() - quiet_since >= _LET_GO_AFTER_S:
                # Twice: what arrived while this process had no time for it is read in between.
                if silent:
                    self._server.close_idle()
                silent = True
        return self._traffic.running == 0

    async def _drain(self, emptied: Coroutine[Any, Any, bool], code: WorkerExit | None) -> None:
        if not await emptied:
            self._pool.fail_requests(_stopping())
        if code is None:
            self._control.drained()
        else:
            self._end(code)

    def _end(self, code: WorkerExit) -> None:
        if not self._exit.done():
            self._exit.set_result(int(code))

    def _exit_code(self, *tasks: asyncio.Task[None]) -> int:
        for task in tasks:
            if task.done():
                error = task.exception()
                if error is not None:
                    exception_event("gateway_crashed", error, part=task.get_name())
                return int(WorkerExit.BUG)
        return self._exit.result()

    async def _watch_lease(self) -> None:
        """Drain and exit when there has been no supervisor for the lease: nothing leaks after an uninstall."""
        draining = False
        while True:
            pause = min(_MAX_LEASE_CHECK_S, self._lease.lease_s / _LEASE_CHECKS)
            await asyncio.sleep(pause)
            if self._lease.expired(self._loop.time(), pause) and not draining:
                draining = True
                event("lease_expired", level="ERROR", lease_s=self._lease.lease_s)
                self._start_drain(self._spec.lifecycle.drain_s, WorkerExit.LEASE_EXPIRED)

    def _scene(self) -> Scene:
        return Scene(
            self._numbers,
            self._vitals.fresh,
            self._catalog.models(),
            self._pool.loads(),
            self._catalog.shedding,
            self._traffic.running,
            self._server.connection_count(),
            self._audit.counts(),
        )

    def _heartbeat(self) -> GatewayHeartbeat:
        traffic = self._traffic
        return GatewayHeartbeat(traffic.running, self._server.connection_count(), traffic.draining)


def _stopping() -> LmxError:
    return LmxError("shutting_down", "The server is stopping.")
