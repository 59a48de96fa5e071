"""The requests of one model: which of them run, which wait, and what becomes of them when their process ends."""

import asyncio
from collections.abc import Callable
from typing import Final, NamedTuple

from gateway.line import NEVER, Line, Waiting
from gateway.peer import ENDED_WORDS, WorkerPeer
from gateway.probation import Probation
from gateway.quarantine import Quarantine, shown
from gateway.requests import Request, RequestState
from protocol.config import GatewayConfig
from protocol.errors import LmxError
from protocol.logs import event


class Route(NamedTuple):
    """Where requests of a model go now: to `peer`, or nowhere, and `why`.

    A request may wait `hold_s` for that to change. `retry_s`: look again after that, even if nothing is told.
    """

    peer: WorkerPeer | None
    why: LmxError | None = None
    hold_s: float = 0.0
    retry_s: float | None = None


#: A process that had no room for a request whose answer it did not begin is asked again after this long.
_BUSY_RETRY_S: Final = 1.0


class Desk:
    """One model's requests. Those that come wait in line behind those that were interrupted."""

    def __init__(
        self,
        model: str,
        config: GatewayConfig,
        quarantine: Quarantine,
        *,
        route: Callable[[str], Route],
        on_idle: Callable[[WorkerPeer], None],
        on_casualties: Callable[[WorkerPeer, list[str]], None],
        on_misbehaved: Callable[[WorkerPeer], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = model
        self._config = config
        self._quarantine = quarantine
        self._route = route
        #: Raises the error for which no new request is taken at all.
        self._check = check
        self._on_idle = on_idle
        self._on_casualties = on_casualties
        self._on_misbehaved = on_misbehaved
        self._probation = Probation()
        self._line = Line()
        self._peers: dict[int, WorkerPeer] = {}
        self._loop = asyncio.get_running_loop()
        self._pumping: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether nobody is here."""
        return not (self._peers or self._line)

    @property
    def waiting(self) -> int:
        """How many are with no process."""
        return len(self._line)

    # -- what the endpoint asks ---------------------------------------------------------------------------------

    def enter(self, request: Request) -> None:
        """Send a new request to its model, now or once that is possible; raise `LmxError` if it never will be."""
        if self._quarantine and self._quarantine.refuses(request.digest, self._loop.time()):
            raise self._quarantine.refusal()
        self._check()
        request.owner = self
        route = self._route(self._model)
        waiting = Waiting(request, self._loop.time())
        free = not (self._probation.active or self._line)
        if free and route.peer is not None:
            if self._submit(waiting, route.peer):
                return
            route = self._route(self._model)
        route = self._explain(route)
        if route.hold_s <= 0 and route.why is not None:
            raise route.why
        if self._line.newcomers >= self._config.max_held:
            text = f"{self._config.max_held} requests wait for the model '{self._model}'; no more may. Try again later."
            raise LmxError("server_busy", text)
        self._line.join(waiting)
        self.pump()

    def leave(self, request: Request) -> None:
        """Forget a request, whatever its state; a process that still works on it is told."""
        peer = self._peers.pop(request.rid, None)
        if peer is not None:
            peer.release(request)
        request.owner = None
        self._drop(request)

    def fail_waiting(self, error: LmxError) -> None:
        """End every request that no process works on."""
        for waiting in self._line.all():
            waiting.request.fail(error)

    # -- what requests and workers report -----------------------------------------------------------------------

    def on_end(self, request: Request) -> None:
        """It has ended."""
        if request.state is RequestState.FINISHED and self._quarantine:
            self._quarantine.acquit(request.digest, self._loop.time())
        self._drop(request)

    def on_mark(self, request: Request) -> None:
        """A suspect has got past the point it died at."""
        self._passed(request)

    def on_connected(self) -> None:
        """A worker can be used."""
        self._pump_soon()

    def on_misbehaved(self, peer: WorkerPeer) -> None:
        """A worker sends what makes no sense."""
        self._on_misbehaved(peer)

    def on_idle(self, peer: WorkerPeer) -> None:
        """A worker has nothing to do."""
        self._on_idle(peer)

    def on_returned(self, peer: WorkerPeer, request: Request, error: LmxError) -> None:
        """A process that is being replaced, or has no room, gives a request back: nobody's fault."""
        self._peers.pop(request.rid, None)
        self._probation.interrupt(request.rid)
        self._interrupt(request, error, avoid=0 if error.code == "server_busy" else peer.incarnation)
        self._pump_soon()

    def on_lost(self, peer: WorkerPeer, requests: list[Request], *, crashed: bool) -> None:
        """A process is gone. Decide who was it, who goes on and who does not."""
        requests = [request for request in requests if not request.ended]
        for request in requests:
            self._peers.pop(request.rid, None)
        suspects = self._name_suspects(peer, requests) if crashed and requests else set()
        if crashed and requests:
            self._on_casualties(peer, [request.trace for request in requests])
        for request in requests:
            self._probation.interrupt(request.rid)
            gone = LmxError("worker_crashed", ENDED_WORDS)
            if request.rid not in suspects or not request.continues:
                self._interrupt(request, gone)
            elif self._quarantine.refuses(request.digest, self._loop.time()):
                request.fail(self._quarantine.refusal())
            elif request.in_flight and request.crashes:
                request.fail(gone)
            else:
                request.crashes += request.in_flight
                self._interrupt(request, gone)
        self._pump_soon()

    def _name_suspects(self, peer: WorkerPeer, requests: list[Request]) -> set[int]:
        """Return the suspects of a crash, each named to the quarantine."""
        running = [request for request in requests if request.in_flight]
        # One that a worker with a free slot has not accepted was just being looked at: that may have been the end too.
        present = requests if len(running) < peer.slots else running
        suspects = self._probation.crashed({request.rid: len(request.tokens) for request in present})
        now = self._loop.time()
        self._line.moved_at = now
        for digest in {request.digest for request in present if request.rid in suspects}:
            if self._quarantine.name(digest, now):
                event("request_quarantined", level="WARNING", model=self._model, digest=shown(digest))
        event(
            "requests_interrupted",
            level="WARNING",
            model=self._model,
            incarnation=peer.incarnation,
            requests=len(requests),
            suspects=len(suspects),
        )
        return suspects

    def _interrupt(self, request: Request, error: LmxError, avoid: int = 0) -> None:
        """Let a request wait for the next process, unless it does not want that."""
        if not request.continues or self._config.hold_while_restarting_s <= 0:
            request.fail(error)
            return
        request.wait()
        now = self._loop.time()
        busy = error.code == "server_busy"
        self._line.join_in_front(Waiting(request, now, error, avoid, now + _BUSY_RETRY_S if busy else 0.0))

    # -- the line -----------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Start what can be started, end what has waited too long."""
        if self._pumping is not None:
            self._pumping.cancel()
            self._pumping = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._line:
            return
        route = self._route(self._model)
        if route.peer is not None:
            if self._probation.active:
                self._start_trial(route.peer)
            else:
                for waiting in self._line.all():
                    self._start(waiting, route.peer)
        self._expire(self._explain(route))

    def _pump_soon(self) -> None:
        """Not at once: the caller is reading frames of a link, or in the middle of a crash."""
        if self._pumping is None and self._line:
            self._pumping = self._loop.call_soon(self._pump_now)

    def _pump_now(self) -> None:
        self._pumping = None
        self.pump()

    def _start_trial(self, peer: WorkerPeer) -> None:
        rid = self._probation.next()
        waiting = None if rid is None else self._line.interrupted(rid)
        if rid is not None and waiting is not None and self._start(waiting, peer):
            waiting.request.mark = self._probation.begin(rid)
            self._line.moved_at = self._loop.time()

    def _start(self, waiting: Waiting, peer: WorkerPeer) -> bool:
        request = waiting.request
        if waiting.avoid == peer.incarnation or self._loop.time() < waiting.not_before:
            return False
        if self._quarantine and self._quarantine.refuses(request.digest, self._loop.time()):
            request.fail(self._quarantine.refusal())
        if request.ended or not self._submit(waiting, peer):
            return False
        self._line.drop(request.rid)
        if not request.ended:
            event(
                "request_continued" if waiting.error is not None else "request_released",
                request_id=request.trace,
                model=self._model,
                incarnation=peer.incarnation,
                tokens=len(request.tokens),
                waited_ms=round((self._loop.time() - waiting.since) * 1000),
            )
        return not request.ended

    def _submit(self, waiting: Waiting, peer: WorkerPeer) -> bool:
        """Return False if the worker is gone. A request that it can never be given is failed."""
        request = waiting.request
        try:
            if not peer.submit(request):
                return False
        except LmxError as error:
            request.fail(error)
            return True
        self._peers[request.rid] = peer
        return True

    def _explain(self, route: Route) -> Route:
        """Return the route with the reason why requests wait although there is a process."""
        if route.peer is None:
            return route
        text = f"The model '{self._model}' is just back after a crash; the requests that were in it go first."
        return Route(None, LmxError("model_restarting", text, param="model"), self._config.hold_while_restarting_s)

    def _expire(self, route: Route) -> None:
        """End what has waited for as long as it may; look again when the next one has."""
        now = self._loop.time()
        for waiting in self._line.overdue(route.hold_s, now):
            error = waiting.error if route.hold_s > 0 and waiting.error is not None else route.why
            assert error is not None, "a route that leads nowhere has a reason"
            waiting.request.fail(error)
        if self._line:
            again = NEVER if route.retry_s is None else now + route.retry_s
            self._timer = self._loop.call_at(min(again, self._line.next_change(route.hold_s, now)), self.pump)

    def _drop(self, request: Request) -> None:
        self._line.drop(request.rid)
        self._passed(request)

    def _passed(self, request: Request) -> None:
        """Nobody has to wait for this one's trial any more."""
        request.mark = None
        if self._probation.forget(request.rid):
            self._line.moved_at = self._loop.time()
            self._pump_soon()
