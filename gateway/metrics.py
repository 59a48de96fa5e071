"""`GET /metrics`: for Prometheus as text, for everyone else as JSON."""

import asyncio
from collections.abc import Callable
from typing import Final

import msgspec
from starlette.types import Receive, Scope, Send

from gateway import exposition
from gateway.admin_call import parameters
from gateway.context import header
from gateway.decode import bad
from gateway.errors import send_json
from gateway.exposition import Scene

_TEXT: Final = b"text/plain; version=0.0.4; charset=utf-8"
_FORMATS: Final = ("prometheus", "json")


class Metrics:
    """The endpoint. `scene` returns what there is to tell at this moment."""

    def __init__(self, scene: Callable[[], Scene]) -> None:
        self._scene = scene
        self._warm = False

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer as `?format=` says, else as `Accept` does."""
        default = "json" if b"application/json" in header(scope, b"accept").lower() else "prometheus"
        wanted = parameters(scope, "format").get("format", default)
        if wanted not in _FORMATS:
            raise bad("format", f"must be {' or '.join(_FORMATS)}")
        if not self._warm:
            # The import takes long enough to be felt by every stream.
            await asyncio.to_thread(exposition.warm)
            self._warm = True
        if wanted == "json":
            body = msgspec.json.encode(exposition.document(self._scene()))
            await send_json(send, 200, body, [(b"cache-control", b"no-store")])
        else:
            await send_json(send, 200, exposition.text(self._scene()), [(b"content-type", _TEXT)])
