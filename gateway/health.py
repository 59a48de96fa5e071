"""`/healthz` and `/readyz`: answered from memory, whatever the models do."""

import msgspec
from starlette.types import Receive, Scope, Send

from gateway.catalog import CatalogView
from gateway.errors import send_json
from gateway.traffic import Traffic
from gateway.vitals import VitalsView
from protocol import __version__


class Healthz:
    """200 as long as the event loop turns."""

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer."""
        await send_json(send, 200, msgspec.json.encode({"status": "ok", "version": __version__}), [])


class Readyz:
    """200 when a request has a chance: a model serves (its canary has passed), there is memory, nothing drains."""

    def __init__(self, catalog: CatalogView, traffic: Traffic, vitals: VitalsView) -> None:
        self._catalog = catalog
        self._traffic = traffic
        self._vitals = vitals

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer."""
        ready, vitals = self._catalog.ready_count(), self._vitals.fresh
        percent = None if vitals is None else vitals.memory_percent
        full = percent is not None and vitals is not None and percent >= 100 * vitals.memory.shed_share
        if self._traffic.draining:
            status, body = 503, {"status": "unavailable", "reason": "draining"}
        elif not ready:
            status, body = 503, {"status": "unavailable", "reason": "no models loaded"}
        elif full or self._catalog.shedding:
            at = "" if percent is None else f" at {percent}%"
            status, body = 503, {"status": "unavailable", "reason": f"memory{at}"}
        else:
            status, body = 200, {"status": "ready"}
        document = {**body, "version": __version__, "models_loaded": ready, "memory_percent": percent}
        await send_json(send, status, msgspec.json.encode(document), [])
