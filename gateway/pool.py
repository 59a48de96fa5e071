"""Which worker serves which model: follows the catalog, opens a link per incarnation, closes those that are over."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from gateway.catalog import CatalogView
from gateway.desk import Desk, Route
from gateway.exposition import Loads
from gateway.link import DataPlane
from gateway.numbers import Numbers
from gateway.peer import WorkerPeer
from gateway.quarantine import Quarantine
from protocol.config import GatewayConfig
from protocol.control import Casualties, Catalog, CatalogModel, Misbehaved, Wanted
from protocol.errors import LmxError
from protocol.states import ModelState

#: A local handshake takes a millisecond; a process that needs longer is stopped or dying.
_CONNECT_S: Final = 2.0
#: After a link has died, the same incarnation is tried again at most this often. It may be alive: it closed one
#: connection, or was cut off for bad frames.
_RELINK_S: Final = 0.5
#: Requests that are named in a crash record.
MAX_CASUALTIES: Final = 256
_WANT_AGAIN_S: Final = 1.0


Report = Casualties | Misbehaved | Wanted


class WorkerPool:
    """The workers that one gateway talks to, and the desks at which requests for them are taken.

    `report` is told which requests a worker had when it crashed, which worker sends nonsense, and which models are
    wanted that are loaded on demand.
    """

    def __init__(
        self, config: GatewayConfig, catalog: CatalogView, report: Callable[[Report], None], numbers: Numbers
    ) -> None:
        self._config = config
        self._report = report
        self._numbers = numbers
        self._catalog = catalog
        self._plane = DataPlane()
        self._quarantine = Quarantine(config.quarantine_after, config.quarantine_s)
        self._desks: dict[str, Desk] = {}
        #: The worker that new requests of a model go to.
        self._current: dict[str, WorkerPeer] = {}
        #: Workers of models that left the catalog, and incarnations that were replaced, while requests of theirs run.
        self._leaving: set[WorkerPeer] = set()
        self._opened_at: dict[str, float] = {}
        #: When the supervisor was last told that somebody wants a model.
        self._wanted_at: dict[str, float] = {}
        #: How long a request waits for a model, by the code of the error that says why it does not serve.
        self._hold_s = {
            "model_loading": config.hold_while_loading_s,
            "model_restarting": config.hold_while_restarting_s,
        }

    def apply(self, catalog: Catalog) -> None:
        """Follow a new catalog: open links to what serves, end those to incarnations that were replaced.

        A model that is merely absent, or not ready, keeps its link: a new supervisor may not have met its worker yet.
        The monitor tells when the process is really gone.
        """
        models = {model.id: model for model in catalog.models}
        for model_id, peer in list(self._current.items()):
            model = models.get(model_id)
            replaced = model is not None and model.incarnation not in {0, peer.incarnation}
            if model is None or replaced:
                del self._current[model_id]
                self._opened_at.pop(model_id, None)
                self._leaving.add(peer)
                if replaced:
                    peer.replaced()
                self._close_if_idle(peer)
        for model in catalog.models:
            if model.state is ModelState.READY and model.endpoint:
                self._route(model.id)
            elif (desk := self._desks.get(model.id)) is not None and not desk.idle:
                self.want(model)  # the last supervisor may not have heard it
        for model_id, desk in list(self._desks.items()):
            desk.pump()
            if desk.idle and model_id not in models:
                del self._desks[model_id]

    def desk_of(self, model: CatalogModel) -> Desk:
        """Return where requests for a model of the catalog are taken."""
        desk = self._desks.get(model.id)
        if desk is None:
            desk = self._desks[model.id] = Desk(
                model.id,
                self._config,
                self._quarantine,
                route=self._route,
                on_idle=self._close_if_idle,
                on_casualties=self._report_casualties,
                on_misbehaved=lambda peer: self._report(Misbehaved(peer.model, peer.incarnation)),
                check=self._catalog.check_load,
            )
        return desk

    def want(self, model: CatalogModel) -> None:
        """Have a model loaded that is loaded on demand; said once a second however many ask."""
        now = time.monotonic()
        if not model.on_demand or now - self._wanted_at.get(model.id, -_WANT_AGAIN_S) < _WANT_AGAIN_S:
            return
        self._wanted_at = {name: at for name, at in self._wanted_at.items() if now - at < _WANT_AGAIN_S}
        self._wanted_at[model.id] = now
        self._report(Wanted(model.id))

    def loads(self) -> dict[str, Loads]:
        """Return how many requests of each model run and wait."""
        found = {model: Loads(0, desk.waiting) for model, desk in self._desks.items()}
        for peer in self._peers():
            running, (ran, waited) = peer.running, found.get(peer.model, Loads(0, 0))
            found[peer.model] = Loads(ran + running, waited + peer.open_requests - running)
        return found

    def fail_requests(self, error: LmxError) -> None:
        """End every request."""
        for desk in self._desks.values():
            desk.fail_waiting(error)
        for peer in self._peers():
            peer.fail_requests(error)

    def close(self) -> None:
        """Close everything."""
        for peer in self._peers():
            peer.close()
        self._plane.close()

    def _peers(self) -> list[WorkerPeer]:
        return [*self._current.values(), *self._leaving]

    def _report_casualties(self, peer: WorkerPeer, traces: list[str]) -> None:
        self._report(Casualties(peer.model, peer.incarnation, traces[:MAX_CASUALTIES]))

    def _route(self, model_id: str) -> Route:
        """Return where requests for a model go now."""
        try:
            model = self._catalog.serving(model_id)
        except LmxError as error:
            return Route(None, error, self._hold_s.get(error.code, 0.0))
        restarting_s = self._config.hold_while_restarting_s
        try:
            peer = self._peer(model)
        except LmxError as error:
            return Route(None, error, restarting_s, _RELINK_S)
        if peer.takes_requests:
            return Route(peer)
        text = f"The process of model '{model_id}' has ended or is being replaced."
        why = LmxError("model_restarting", text, param="model")
        if peer.dead:
            return Route(None, why, restarting_s, _RELINK_S)
        return Route(None, why, max(restarting_s, _CONNECT_S))

    def _peer(self, model: CatalogModel) -> WorkerPeer:
        peer = self._current.get(model.id)
        if peer is not None and peer.incarnation == model.incarnation:
            now = asyncio.get_running_loop().time()
            if not peer.dead or now - self._opened_at[model.id] < _RELINK_S:
                return peer
        return self._open(model)

    def _open(self, model: CatalogModel) -> WorkerPeer:
        self._opened_at[model.id] = asyncio.get_running_loop().time()
        known = model.capabilities
        peer = WorkerPeer(
            self._plane,
            model.id,
            model.incarnation,
            model.endpoint,
            slots=1 if known is None else known.max_concurrent_requests,
            owner=self.desk_of(model),
            numbers=self._numbers.of(model.id),
        )
        self._current[model.id] = peer
        return peer

    def _close_if_idle(self, peer: WorkerPeer) -> None:
        if peer in self._leaving and not peer.open_requests:
            self._leaving.discard(peer)
            peer.close()
