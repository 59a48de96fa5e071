"""`/admin/models`: what is loaded, whether something would fit, and orders about one model."""

from collections.abc import Callable
from typing import Annotated, Any, Final

import msgspec
from starlette.types import Receive, Scope, Send

from gateway.admin_call import hello_of, parameters, read_body, send_document, while_connected
from gateway.body import BodyReader
from gateway.catalog import CatalogView
from gateway.decode import missing
from gateway.forward import Action, Forwarder
from protocol.control import FitRequest, LoadRequest, Progress, RestartRequest, Result, StatusRequest
from protocol.states import ModelState

ADMIN_MODELS_SCHEMA: Final = "lmx.admin.models/1"


class _Order(msgspec.Struct, forbid_unknown_fields=True):
    model: str


class _Load(_Order, forbid_unknown_fields=True):
    pin: bool = False
    #: Seconds without a request after which it is unloaded, 0 never.
    ttl_s: Annotated[float, msgspec.Meta(ge=0, le=31_536_000)] | None = None
    #: Whether the answer comes when the model is ready, or as soon as it is being loaded.
    wait: bool = True


class _Restart(_Order, forbid_unknown_fields=True):
    force: bool = False
    wait: bool = True


class ModelsStatus:
    """Describes every model that is loaded, and names those that could be."""

    def __init__(self, forwarder: Forwarder, catalog: CatalogView) -> None:
        self._forwarder = forwarder
        self._catalog = catalog

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        parameters(scope)
        question = self._forwarder.ask(StatusRequest(), hello_of(scope))
        status: dict[str, Any] = msgspec.json.decode(await while_connected(receive, question))
        loaded = {model["id"] for model in status["models"]}
        loadable = [m.id for m in self._catalog.models() if m.state is ModelState.STOPPED and m.id not in loaded]
        document = {"schema": ADMIN_MODELS_SCHEMA, "models": status["models"], "loadable": loadable}
        await send_document(send, msgspec.json.encode(document))


class Fit:
    """Says whether a model would fit into memory, and what a load would unload for it."""

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        model = parameters(scope, "model").get("model", "")
        if not model:
            raise missing("model")
        question = self._forwarder.ask(FitRequest(model, ""), hello_of(scope))
        await send_document(send, await while_connected(receive, question))


class ModelOrder:
    """Has done with a model what is done at once, or nearly: `make(model)` is the order."""

    def __init__(self, forwarder: Forwarder, bodies: BodyReader, make: Callable[[str], Action]) -> None:
        self._forwarder = forwarder
        self._bodies = bodies
        self._make = make
        self._decoder = msgspec.json.Decoder(_Order)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do it, and answer."""
        wanted = await read_body(self._bodies, scope, receive, send, self._decoder)
        if wanted is not None:
            order = self._forwarder.order(self._make(wanted.model), hello_of(scope))
            await _answer(send, wanted.model, await while_connected(receive, order))


class Load:
    """Loads a model that is known by its id."""

    def __init__(self, forwarder: Forwarder, bodies: BodyReader) -> None:
        self._forwarder = forwarder
        self._bodies = bodies
        self._decoder = msgspec.json.Decoder(_Load)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do it, and answer."""
        wanted = await read_body(self._bodies, scope, receive, send, self._decoder)
        if wanted is not None:
            load = LoadRequest(wanted.model, "", wanted.pin, wanted.ttl_s)
            order = self._forwarder.order(load, hello_of(scope), wait=wanted.wait)
            await _answer(send, wanted.model, await while_connected(receive, order))


class Restart:
    """Replaces a model's process."""

    def __init__(self, forwarder: Forwarder, bodies: BodyReader) -> None:
        self._forwarder = forwarder
        self._bodies = bodies
        self._decoder = msgspec.json.Decoder(_Restart)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do it, and answer."""
        wanted = await read_body(self._bodies, scope, receive, send, self._decoder)
        if wanted is not None:
            restart = RestartRequest(wanted.model, wanted.force)
            order = self._forwarder.order(restart, hello_of(scope), wait=wanted.wait)
            await _answer(send, wanted.model, await while_connected(receive, order))


async def _answer(send: Send, model: str, end: Result | Progress) -> None:
    """Answer 200 for what is done, 202 for what goes on."""
    if isinstance(end, Progress):
        document = {"status": "accepted", "model": model, "state": end.state.value, "message": "see /admin/models"}
        await send_document(send, msgspec.json.encode(document), 202)
        return
    pids = {name: pid for name, pid in (("old_pid", end.old_pid), ("new_pid", end.new_pid)) if pid}
    done: dict[str, object] = {"status": "done", "model": model, "message": end.message, **pids}
    await send_document(send, msgspec.json.encode(done))
