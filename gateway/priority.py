"""How urgent a request is: what its key says, or less if its header asks for that. Pure."""

from typing import Final

from starlette.types import Scope

from gateway.context import header
from protocol.errors import LmxError

_HEADER: Final = "X-LMX-Priority"
_BATCH: Final = -1


def priority_of(scope: Scope, own: int) -> int:
    """Return the priority of a request whose key has `own`, 0 without one; higher goes first.

    Raises `forbidden` for one that asks for more than its key may, `invalid_value` for what is no priority.
    """
    wish = header(scope, _HEADER.lower().encode()).strip().lower().decode("latin-1")
    match wish:
        case "":
            return own
        case "high":
            if own > 0:
                return own
            text = f"{_HEADER}: high needs a key that may: 'lmx-supervisor keys create --priority 1' makes one."
            raise LmxError("forbidden", text, param=_HEADER)
        case "normal":
            return min(own, 0)
        case "batch":
            return min(own, _BATCH)
    raise LmxError("invalid_value", f"{_HEADER} must be 'high', 'normal' or 'batch'.", param=_HEADER)
