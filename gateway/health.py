"""`/healthz` and `/readyz`: answered from memory, whatever the models do."""

import msgspec
from starlette.types import Receive, Scope, Send

from gateway.catalog import CatalogView
from gateway.errors import send_json
from gateway.traffic import Traffic
from protocol import __version__


class Healthz:
    """200 as long as the event loop turns."""

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer."""
        await send_json(send, 200, msgspec.json.encode({"status": "ok", "version": __version__}), [])


class Readyz:
    """200 when a request has a chance: some model serves and the gateway is not stopping."""

    def __init__(self, catalog: CatalogView, traffic: Traffic) -> None:
        self._catalog = catalog
        self._traffic = traffic

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer."""
        ready = self._catalog.ready_count()
        if self._traffic.draining:
            status, body = 503, {"status": "unavailable", "reason": "draining"}
        elif not ready:
            status, body = 503, {"status": "unavailable", "reason": "no models loaded"}
        else:
            status, body = 200, {"status": "ready"}
        document = {**body, "version": __version__, "models_loaded": ready}
        await send_json(send, status, msgspec.json.encode(document), [])
