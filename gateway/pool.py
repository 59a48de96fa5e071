"""Which worker serves which model: follows the catalog, opens a link per incarnation, closes those that are over."""

import asyncio
import contextlib
from typing import Final

from gateway.link import DataPlane
from gateway.peer import WorkerPeer
from protocol.control import Catalog, CatalogModel
from protocol.errors import LmxError
from protocol.states import ModelState

#: A local handshake takes a millisecond; a process that needs longer is stopped or dying.
_CONNECT_S: Final = 2.0
#: After a link has died, the same incarnation is tried again at most this often. It may be alive: it closed one
#: connection, or was cut off for bad frames.
_RELINK_S: Final = 0.5


class WorkerPool:
    """The workers that one gateway talks to."""

    def __init__(self) -> None:
        self._plane = DataPlane()
        #: The worker that new requests of a model go to.
        self._current: dict[str, WorkerPeer] = {}
        #: Workers of models that left the catalog, while requests of theirs still run.
        self._leaving: set[WorkerPeer] = set()
        self._opened_at: dict[str, float] = {}

    def apply(self, catalog: Catalog) -> None:
        """Follow a new catalog: open links to what serves, end those to incarnations that were replaced.

        A model that is merely absent, or not ready, keeps its link: a new supervisor may not have met its worker yet.
        The monitor tells when the process is really gone.
        """
        models = {model.id: model for model in catalog.models}
        for model_id, peer in list(self._current.items()):
            model = models.get(model_id)
            if model is None:
                del self._current[model_id]
                self._opened_at.pop(model_id, None)
                self._leaving.add(peer)
                self._close_if_idle(peer)
            elif model.incarnation not in {0, peer.incarnation}:
                peer.fail("worker_crashed", "replaced")
        for model in catalog.models:
            if model.state is ModelState.READY and model.endpoint:
                with contextlib.suppress(LmxError):  # logged; the next request tries again
                    self._peer(model)

    async def peer_of(self, model: CatalogModel) -> WorkerPeer:
        """Return the connected worker of a model that serves; raise `LmxError` if its process does not answer."""
        peer = self._peer(model)
        await peer.connected(_CONNECT_S)
        return peer

    def fail_requests(self, error: LmxError) -> None:
        """End every request."""
        for peer in self._peers():
            peer.fail_requests(error)

    def close(self) -> None:
        """Close everything."""
        for peer in self._peers():
            peer.close()
        self._plane.close()

    def _peers(self) -> list[WorkerPeer]:
        return [*self._current.values(), *self._leaving]

    def _peer(self, model: CatalogModel) -> WorkerPeer:
        peer = self._current.get(model.id)
        if peer is not None and peer.incarnation == model.incarnation:
            now = asyncio.get_running_loop().time()
            if not peer.dead or now - self._opened_at[model.id] < _RELINK_S:
                return peer
        return self._open(model)

    def _open(self, model: CatalogModel) -> WorkerPeer:
        self._opened_at[model.id] = asyncio.get_running_loop().time()
        peer = WorkerPeer(self._plane, model.id, model.incarnation, model.endpoint, self._close_if_idle)
        self._current[model.id] = peer
        return peer

    def _close_if_idle(self, peer: WorkerPeer) -> None:
        if peer in self._leaving and not peer.open_requests:
            self._leaving.discard(peer)
            peer.close()
