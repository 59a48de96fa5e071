"""`/v1/models` and `/v1/models/{id}`, from the catalog at once: pickers poll them."""

import msgspec
from starlette.types import Receive, Scope, Send

from gateway.catalog import CatalogView
from gateway.errors import send_json
from gateway.responses import ModelCard, ModelList
from protocol.control import CatalogModel


class Models:
    """Lists every model, in whatever state."""

    def __init__(self, catalog: CatalogView) -> None:
        self._catalog = catalog

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer."""
        await self._catalog.arrived()
        cards = ModelList([card(model) for model in self._catalog.models()])
        await send_json(send, 200, msgspec.json.encode(cards), [])


class Model:
    """Describes one model."""

    def __init__(self, catalog: CatalogView) -> None:
        self._catalog = catalog

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer."""
        await self._catalog.arrived()
        # Not the route's parameter: its pattern leaves out a line end.
        model = self._catalog.find(scope["path"].removeprefix("/models/"))
        await send_json(send, 200, msgspec.json.encode(card(model)), [])


def card(model: CatalogModel) -> ModelCard:
    """Return what a client sees of a model."""
    known = model.capabilities
    return ModelCard(
        id=model.id,
        created=model.created_at,
        state=model.state.value,
        max_model_len=None if known is None else known.max_model_len,
        capabilities=[] if known is None else known.kinds,
    )
