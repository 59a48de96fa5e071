"""The models as the supervisor last described them, and why one of them does not serve."""

import asyncio
import contextlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from gateway.decode import shorten
from protocol.control import Catalog, CatalogModel
from protocol.errors import LmxError, from_peer
from protocol.states import ModelState

#: How long a request waits for the first catalog of a gateway that has just started.
FIRST_CATALOG_S: Final = 5.0

#: State -> the error and words for a model that the supervisor gave no reason for.
_BY_STATE: Final[Mapping[ModelState, tuple[str, str]]] = MappingProxyType(
    {
        ModelState.STARTING: ("model_loading", "is starting"),
        ModelState.LOADING: ("model_loading", "is being loaded"),
        ModelState.WARMING: ("model_loading", "is warming up"),
        ModelState.DRAINING: ("model_restarting", "is being stopped or replaced"),
        ModelState.STOPPING: ("model_restarting", "is being stopped or replaced"),
        ModelState.BACKOFF: ("model_restarting", "is being restarted"),
        ModelState.QUARANTINED: ("model_quarantined", "was set aside after repeated failures"),
    }
)


class CatalogView:
    """Holds the current catalog. It is kept, and served from, while no supervisor is there."""

    def __init__(self) -> None:
        self._models: dict[str, CatalogModel] = {}
        self._arrived = asyncio.Event()
        #: The machine is short of memory.
        self._shedding = False

    def replace(self, catalog: Catalog) -> None:
        """Take over a new catalog, whole."""
        self._models = {model.id: model for model in catalog.models}
        self._shedding = catalog.shedding
        self._arrived.set()

    @property
    def shedding(self) -> bool:
        """Whether the machine is so short of memory that no inference should begin."""
        return self._shedding

    def check_load(self) -> None:
        """Raise `load_shedding` while the machine is so short of memory that no inference should begin."""
        if self._shedding:
            raise LmxError("load_shedding", "The machine is short of memory. Try again in a moment.")

    async def arrived(self) -> bool:
        """Wait a little for the first catalog: until then every model would look unknown. Return whether it came."""
        if not self._arrived.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_CATALOG_S):
                    await self._arrived.wait()
        return self._arrived.is_set()

    def models(self) -> list[CatalogModel]:
        """Return every model, in the supervisor's order."""
        return list(self._models.values())

    def ready_count(self) -> int:
        """Return how many models serve."""
        return sum(model.state is ModelState.READY for model in self._models.values())

    def find(self, model_id: str) -> CatalogModel:
        """Return the model called `model_id` in whatever state; raise `model_not_found`."""
        model = self._models.get(model_id)
        if model is None:
            raise _unknown(model_id, self._arrived.is_set())
        return model

    def serving(self, model_id: str) -> CatalogModel:
        """Return the model called `model_id` if it serves; raise the error that says why it does not."""
        model = self.find(model_id)
        if model.state is not ModelState.READY:
            raise not_ready(model)
        return model


def not_ready(model: CatalogModel) -> LmxError:
    """Return the error for a model that is known and does not serve."""
    if model.error_code:
        reason = model.reason or f"The model '{model.id}' does not serve."
        return from_peer(model.error_code, reason, param="model", retry_after_s=model.retry_after_s)
    if model.state not in _BY_STATE:
        text = f"The model '{model.id}' is not loaded. Load it with: lmx-supervisor load {model.id}"
        return LmxError("model_not_found", text, param="model")
    code, words = _BY_STATE[model.state]
    reason = f" ({model.reason})" if model.reason else ""
    text = f"The model '{model.id}' {words}{reason}."
    return LmxError(code, text, param="model", retry_after_s=model.retry_after_s)


def _unknown(model_id: str, informed: bool) -> LmxError:
    if not informed:
        return LmxError("model_loading", "The server is starting and does not know its models yet.", param="model")
    name = shorten(model_id)
    text = f"The model '{name}' does not exist. GET /v1/models lists those that do; lmx-supervisor load adds one."
    return LmxError("model_not_found", text, param="model")
