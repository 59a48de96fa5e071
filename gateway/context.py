"""What every layer of the application knows about the HTTP request it works on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol, cast

from starlette.types import Scope

from gateway.auth import Access

#: Key of the ASGI extension through which `gateway.server` offers its connection.
CONNECTION_EXTENSION: Final = "lmx.connection"
#: Key of the one through which it offers to write a piece of a chunked body at once.
WRITE_EXTENSION: Final = "lmx.write"
_CONTEXT: Final = "lmx.context"
_ADMIN: Final = ("/admin", "/ws")


def is_admin_path(path: str) -> bool:
    """Return whether a canonical path is for administrators."""
    return any(path == root or path.startswith(f"{root}/") for root in _ADMIN)


class ClientGoneError(Exception):
    """The client closed its connection; there is nobody to answer."""


class Connection(Protocol):
    """What ASGI cannot ask of a connection."""

    def take_up(self) -> int:
        """Note that somebody works on its request; return how many others have arrived and wait for that."""

    def close_after_response(self) -> None:
        """Do not keep the connection alive after the response that is running."""

    def abort(self) -> None:
        """Close at once and drop what is unsent: the only way out of a write that a client never reads."""


@dataclass(frozen=True, slots=True)
class Worked:
    """What became of a request that a model was asked: for the log and the audit, numbers and our own names only.

    `error` is the code it ended with; `left`: its client went away. Times in milliseconds.
    """

    model: str
    stream: bool
    priority: int = 0
    incarnation: int | None = None
    ttft_ms: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None
    left: bool = False


@dataclass(slots=True)
class RequestContext:
    """One HTTP request. `started` is `time.monotonic()` when its headers had been read."""

    request_id: str
    started: float
    connection: Connection | None
    #: Headers that a response carries whatever its status.
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    #: Who sent it, once `gateway.door` has let it in.
    access: Access | None = None
    #: Its address, as far as it can be told: that of a trusted proxy's client. Also of one that is refused.
    address: str = ""
    #: W3C trace context: the client's, then that of our own span; empty if nobody traces the request.
    traceparent: str = ""
    #: Of the error that it was answered with, or that ended its stream; empty if none did.
    error_code: str = ""
    #: Tokens of prompt and answer, once they are known: what a limit on tokens counts in the end.
    tokens_used: int | None = None
    #: What the client calls itself; "" if it does not, or says what nobody should write down.
    client_id: str = ""
    worked: Worked | None = None

    @property
    def client(self) -> str | None:
        """Whom limits count: a key or an address; None if nobody knows yet."""
        return self.access.client if self.access is not None else self.address or None

    def take_up(self) -> int:
        """Note that somebody works on it; return how many others are there and wait for that, 0 if nobody knows."""
        return 0 if self.connection is None else self.connection.take_up()

    def close_after_response(self) -> None:
        """Do not keep the connection alive, if the server can tell it so."""
        if self.connection is not None:
            self.connection.close_after_response()

    def abort(self) -> None:
        """Cut the connection, if the server can."""
        if self.connection is not None:
            self.connection.abort()


def attach(scope: Scope, context: RequestContext) -> None:
    """Make `context` the context of this request."""
    scope.setdefault("state", {})[_CONTEXT] = context


def context_of(scope: Scope) -> RequestContext:
    """Return the context that `gateway.middleware` attached."""
    return cast(RequestContext, scope["state"][_CONTEXT])


def connection_of(scope: Scope) -> Connection | None:
    """Return the server's connection, None under a server that offers none."""
    return cast(Connection | None, scope.get("extensions", {}).get(CONNECTION_EXTENSION))


def writer_of(scope: Scope) -> Callable[[bytes], bool] | None:
    """Return what writes into the response that has begun, past everything around the endpoint.

    It returns False, having written nothing, where ASGI's `send` is the way: when the client takes nothing now.
    """
    return cast(Callable[[bytes], bool] | None, scope.get("extensions", {}).get(WRITE_EXTENSION))


def header(scope: Scope, name: bytes) -> bytes:
    """Return the first header called `name` (lower case), or nothing."""
    for key, value in scope["headers"]:
        if key == name:
            return cast(bytes, value)
    return b""
