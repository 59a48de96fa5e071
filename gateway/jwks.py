"""The public keys of an identity provider (JWKS): fetched when they are needed, kept for a while, bounded.

Where they are is said by the configuration alone; what a token says of itself (`jku`, `x5u`, `jwk`) is never looked at.
"""

import asyncio
import time
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import jwt
import msgspec

from protocol.logs import event

#: Keys are fetched anew after this long, and a key that is not among them brings that forward, but not more often than
#: the second: strangers can name keys that do not exist.
FRESH_S: Final = 600.0
AGAIN_S: Final = 30.0
#: While the provider is away its last keys go on for so long.
STALE_S: Final = 24 * 3600.0
_FETCH_S: Final = 5.0
_MAX_BYTES: Final = 256 * 1024
_MAX_KEYS: Final = 100
#: Kinds of keys that have a public half, and what can be signed with them. A symmetric one (`oct`) would let whoever
#: can verify also sign.
_PUBLIC: Final = MappingProxyType({"RSA": ("RS", "PS"), "EC": ("ES",), "OKP": ("EdDSA",)})


class PublicKey(NamedTuple):
    """One key. `algorithms` are the beginnings of the names of those it is for."""

    key: Any
    algorithms: tuple[str, ...]

    def fits(self, algorithm: str) -> bool:
        """Return whether something may be signed so with it."""
        return algorithm.startswith(self.algorithms)


class NoKeysError(Exception):
    """There are no keys to check with, and none could be fetched."""


class _Document(msgspec.Struct):
    keys: list[dict[str, Any]]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object, **__: object) -> None:
        """Go nowhere else: the address in the configuration is the one that is trusted."""


def fetch(place: str) -> bytes:
    """Return the document at an address or in a file; raise `OSError`. Blocks for at most some seconds."""
    if not place.startswith(("https://", "http://")):
        with Path(place).open("rb") as stream:
            return stream.read(_MAX_BYTES)
    opener = urllib.request.build_opener(_NoRedirects)
    with opener.open(place, timeout=_FETCH_S) as answer:
        found: bytes = answer.read(_MAX_BYTES)
        return found


def parse(document: bytes) -> dict[str, PublicKey]:
    """Return the usable keys by their ids ("" for one without); raise `ValueError` for what is no set of keys."""
    try:
        listed = msgspec.json.decode(document, type=_Document).keys
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        msg = "it is not a JSON Web Key Set"
        raise ValueError(msg) from None
    found: dict[str, PublicKey] = {}
    for key in listed[:_MAX_KEYS]:
        algorithms = _PUBLIC.get(str(key.get("kty")))
        if algorithms is None or key.get("use", "sig") != "sig":
            continue
        try:
            made = PublicKey(jwt.PyJWK(key).key, (key["alg"],) if isinstance(key.get("alg"), str) else algorithms)
        except (jwt.PyJWTError, ValueError, TypeError, KeyError):
            continue  # of a kind that is not known here; the others may be
        found[str(key.get("kid", ""))] = made
    return found


class KeySet:
    """The keys at one place. Owned by one event loop; `clock` is monotonic seconds."""

    def __init__(
        self, place: str, get: Callable[[str], bytes] = fetch, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._place = place
        self._get = get
        self._clock = clock
        self._keys: dict[str, PublicKey] = {}
        self._fetched_at = float("-inf")
        self._tried_at = float("-inf")
        self._lock = asyncio.Lock()

    async def find(self, kid: str) -> PublicKey | None:
        """Return the key with this id ("": the only one there is), None if there is none; raise `NoKeysError`."""
        if self._due(kid):
            async with self._lock:  # everyone else waits for the one fetch
                if self._due(kid):
                    await self._fetch()
        if not self._keys or self._clock() - self._fetched_at > STALE_S:
            raise NoKeysError
        return self._known(kid)

    def _due(self, kid: str) -> bool:
        now = self._clock()
        if now - self._tried_at < AGAIN_S:
            return False
        return now - self._fetched_at >= FRESH_S or self._known(kid) is None

    def _known(self, kid: str) -> PublicKey | None:
        if not kid and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(kid) if kid else None

    async def _fetch(self) -> None:
        self._tried_at = self._clock()
        try:
            keys = parse(await asyncio.to_thread(self._get, self._place))
        except (OSError, ValueError, HTTPException) as error:
            event("jwks_not_read", level="ERROR", why=getattr(error, "strerror", None) or type(error).__name__)
            return
        if not keys:
            event("jwks_not_read", level="ERROR", why="there is no public key in it")
            return
        self._keys, self._fetched_at = keys, self._clock()
        event("jwks_read", keys=len(keys))
