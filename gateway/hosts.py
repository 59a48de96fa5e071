"""Which `Host` names are answered: a web page that points its own name at this machine must not be.

In DNS rebinding a page from attacker.example looks its own name up again and gets our address; the browser then takes
us for that page's server and lets it read everything. The name stays in `Host`, and is none of ours. An address in
`Host` cannot be rebound, so every address is answered.
"""

import ipaddress
import re
import socket
from collections.abc import Iterable
from functools import lru_cache, partial
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.errors import send_error
from protocol.errors import LmxError

_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")
_MAX_HOST: Final = 300


class HostGuard:
    """Answers requests for a host that is none of ours with 421. Health routes are for probes and take any."""

    def __init__(self, app: ASGIApp, allowed: Iterable[str], health: frozenset[str]) -> None:
        self._app = app
        self._any = "*" in allowed
        self._names = frozenset(own_names() if "own" in allowed else ()) | (frozenset(allowed) - {"*", "own"})
        self._health = health
        self._is_allowed = lru_cache(maxsize=1024)(partial(is_allowed, names=self._names))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        if self._any or scope["type"] == "lifespan" or self._fine(scope) or scope["path"] in self._health:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            text = "This server does not answer to that Host. Name it in security.allowed_hosts if it should."
            await send_error(scope, send, LmxError("host_not_allowed", text))

    def _fine(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"host"]
        # Every browser sends one, so what sends none is none.
        return not given or (len(given) == 1 and self._is_allowed(given[0]))


def is_allowed(host: bytes, names: frozenset[str]) -> bool:
    """Return whether a `Host` header holds an address, a loopback name, or one of `names`; a port does not matter."""
    if len(host) > _MAX_HOST or not host.isascii():
        return False
    found = _HOST.fullmatch(host.decode("ascii").lower())
    if found is None:
        return False
    name = found[1].removesuffix(".")
    if name in names or name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def own_names() -> set[str]:
    """Return the names that this machine gives itself; no name server is asked."""
    name = socket.gethostname().lower().removesuffix(".")
    short = name.partition(".")[0]
    return {each for each in (name, short, f"{short}.local") if each.strip(".") and each != ".local"}
