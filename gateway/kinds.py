"""What a model can be asked for: one for embeddings does not chat, and the other way round."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from protocol.control import CatalogModel
from protocol.data import Kind
from protocol.errors import LmxError

#: Kind -> the capability it takes, and the endpoint in words. What is not here is asked of the model itself.
_NEEDS: Final[Mapping[Kind, tuple[str, str]]] = MappingProxyType(
    {
        Kind.CHAT: ("chat", "/v1/chat/completions"),
        Kind.COMPLETION: ("chat", "/v1/completions"),
        Kind.EMBED: ("embedding", "/v1/embeddings"),
        Kind.RERANK: ("rerank", "/v1/rerank"),
    }
)


def check_kind(model: CatalogModel, kind: Kind) -> None:
    """Raise `invalid_value` if the model is known not to do that. One that has never been loaded is asked itself."""
    known = model.capabilities
    if known is None or kind not in _NEEDS:
        return
    capability, endpoint = _NEEDS[kind]
    if capability in known.kinds:
        return
    fitting = [path for wanted, path in _NEEDS.values() if wanted in known.kinds]
    instead = f"Use it with {' or '.join(fitting)}" if fitting else "It can be used for nothing that LMX offers"
    text = f"The model '{model.id}' does not do {endpoint}. {instead}, or name another model."
    raise LmxError("invalid_value", text, param="model")
