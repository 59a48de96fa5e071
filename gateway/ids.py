"""Names that clients give: taken only if they can be written down, which they will be, and are no secret."""

import re
import secrets
from typing import Final

from starlette.types import Scope

from gateway.context import header

_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_CLIENT_ID: Final = re.compile(rb"[A-Za-z0-9._@:/-]{1,64}")
#: Keys of ours wherever they stand, and what the well-known kinds of tokens begin with: people paste them anywhere.
_SECRET: Final = re.compile(
    rb"lmx-[A-Za-z0-9_-]{43}"
    rb"|^(?:sk|pk|rk)[-_]|^hf_|^gh[a-z]_|^github_pat_|^glpat-|^xox[a-z]-|^AKIA[A-Z0-9]|^AIza|^Bearer",
    re.IGNORECASE,
)
#: A JSON web token.
_TOKEN: Final = re.compile(rb"eyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.")
_SECRET_HEADERS: Final = frozenset({b"authorization", b"x-api-key", b"cookie", b"sec-websocket-protocol"})
#: A shorter text is in no key by chance only.
_MIN_PART: Final = 12


def request_id(scope: Scope) -> str:
    """Return the client's id if it is safe to log and echo, else a new one."""
    offered = header(scope, b"x-request-id")
    if offered and _REQUEST_ID.fullmatch(offered) and not looks_secret(offered, scope):
        return offered.decode("ascii")
    return new_request_id()


def new_request_id() -> str:
    """Return an id that nobody has: 22 characters of URL-safe base64 are 128 random bits."""
    return f"req_{secrets.token_urlsafe(16)}"


def client_id(scope: Scope) -> str:
    """Return what the client calls itself in `X-Client-ID`; "" if that is nothing, or nothing to write down."""
    offered = header(scope, b"x-client-id")
    if offered and _CLIENT_ID.fullmatch(offered) and not looks_secret(offered, scope):
        return offered.decode("ascii")
    return ""


def looks_secret(name: bytes, scope: Scope) -> bool:
    """Return whether a name has the form of a key or a token, or is in a header of this request that holds one."""
    if _SECRET.search(name) or _TOKEN.match(name):
        return True
    if len(name) < _MIN_PART:
        return False
    return any(name in value for key, value in scope["headers"] if key in _SECRET_HEADERS)
