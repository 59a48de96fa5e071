"""Who sends a request: the key in its headers, what that key may do, and the refusal of everyone else."""

import hmac
import re
import time
from dataclasses import dataclass
from typing import Final

from starlette.types import Scope

from gateway.keyring import Keyring
from protocol.errors import LmxError
from protocol.keys import KeyRecord, KeyStoreError, digest_of, looks_like_a_key

_BEARER: Final = re.compile(rb"[Bb][Ee][Aa][Rr][Ee][Rr] +([!-~]+)")
_HOW: Final = "Send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'; lmx-supervisor keys create makes a key."
#: What a key follows that is offered as a WebSocket's protocol.
_KEY_PROTOCOL: Final = b"lmx-key."
#: The admin key's own name in logs and limits.
ADMIN: Final = "admin"


@dataclass(frozen=True, slots=True)
class Access:
    """What the sender of a request is known as and may do. `client` is a key's id or an address, never a key."""

    client: str
    key: KeyRecord | None = None
    admin: bool = False
    #: An identity provider says who it is.
    token: bool = False

    @property
    def priority(self) -> int:
        """How urgent its requests are; higher goes first."""
        return self.key.priority if self.key is not None else 0

    @property
    def models(self) -> tuple[str, ...]:
        """The ids of the models it may use; empty: all."""
        return self.key.models if self.key is not None else ()

    def may_use(self, model: str) -> bool:
        """Return whether it may use a model."""
        return not self.models or model in self.models

    def check_model(self, model: str) -> None:
        """Raise `forbidden` for a model it may not use, whether or not there is one of that name."""
        if not self.may_use(model):
            assert self.key is not None
            text = f"The key '{self.key.name}' may not use that model. It may use: {', '.join(self.models)}."
            raise LmxError("forbidden", text, param="model")


@dataclass(frozen=True, slots=True)
class Credential:
    """What the headers hold: a key, or nothing, or something that can only be refused."""

    key: bytes = b""
    #: What is wrong with them, in words, if nobody could tell which key is meant.
    ambiguous: str = ""


def looks_like_a_token(key: bytes) -> bool:
    """Return whether this could be a JSON Web Token: three parts, the first a JSON object in base64."""
    return key.startswith(b"eyJ") and key.count(b".") == 2


def credential_of(scope: Scope) -> Credential:
    """Read `Authorization` and `X-API-Key`; of a WebSocket also its protocols, all that a web page can send.

    Never raises, whatever they hold.
    """
    bearers: list[bytes] = []
    keys: list[bytes] = []
    for name, value in scope["headers"]:
        if name == b"authorization":
            bearers.append(value)
        elif name == b"x-api-key":
            keys.append(value)
        elif name == b"sec-websocket-protocol" and scope.get("type") == "websocket":
            offered = (part.strip(b" \t") for part in value.split(b","))
            keys += [part.removeprefix(_KEY_PROTOCOL) for part in offered if part.startswith(_KEY_PROTOCOL)]
    if not bearers and not keys:
        return Credential()
    if len(bearers) > 1 or len(keys) > 1:
        return Credential(ambiguous="There is more than one Authorization or X-API-Key header.")
    found = {_token(value) for value in bearers} | {value.strip(b" \t") for value in keys}
    if not all(value.isascii() for value in (*bearers, *keys)):
        return Credential(ambiguous="A key has ASCII characters only.")
    found.discard(b"")
    if len(found) > 1:
        return Credential(ambiguous="Authorization and X-API-Key hold different keys.")
    return Credential(found.pop() if found else b"")


def _token(value: bytes) -> bytes:
    """Return the key of a bearer header; another scheme is kept whole: it is no key, but not nothing either."""
    value = value.strip(b" \t")
    if value.lower() == b"bearer":
        return b""
    found = _BEARER.fullmatch(value)
    return found[1] if found else value


class Authenticator:
    """Decides who comes in. `admin_digest` is hexadecimal; empty: nobody is admin but by a key of that scope."""

    def __init__(self, keyring: Keyring, admin_digest: str, *, keys_required: bool) -> None:
        self._keyring = keyring
        self._admin = bytes.fromhex(admin_digest)
        self._required = keys_required

    def admin(self, credential: Credential, token: Access | None = None) -> Access:
        """Return the access of an administrator; raise 401 for no key, 403 for one that does not suffice.

        `token` is what an identity provider's token allows, if the credential is one that was found good.
        """
        access = token or self._known(credential)
        if access is not None and access.admin:
            return access
        if credential.ambiguous or not credential.key:
            raise unauthorized(credential.ambiguous or f"This route needs the admin key. {_HOW}")
        raise LmxError("forbidden", "This route needs the admin key, or a key with the scope admin.")

    def inference(self, credential: Credential, address: str, token: Access | None = None) -> Access:
        """Return the access to everything else; raise 401.

        Where no key is needed, one that is not ours counts for nothing (clients often send `unused`), but one of our
        form has to be good: who is given a key shall learn that it was revoked.
        """
        access = token or self._known(credential)
        if access is not None:
            return access
        if credential.ambiguous:
            raise unauthorized(credential.ambiguous)
        if self._required and not credential.key:
            raise unauthorized(f"This server needs an API key. {_HOW}")
        if self._required or looks_like_a_key(credential.key):
            raise unauthorized("That API key is not known here, or was revoked.")
        return Access(address)

    def _known(self, credential: Credential) -> Access | None:
        """Return whose key this is, None for nobody's; raise 401 for one whose time is over, 503 if it is not known."""
        key = credential.key
        if not key or credential.ambiguous:
            return None
        digest = digest_of(key)
        if self._admin and hmac.compare_digest(digest, self._admin):
            return Access(ADMIN, admin=True)
        if not self._required and not looks_like_a_key(key):
            return None
        try:
            record = self._keyring.find(digest)
        except KeyStoreError:
            text = "The keys of this server cannot be read, so none can be checked. Its operator finds why in its log."
            raise LmxError("access_check_failed", text) from None
        if record is None:
            return None
        if record.expired(time.time()):
            raise unauthorized("That API key has expired. Ask the operator of this server for another one.")
        return Access(f"key:{record.id}", record, admin=record.scope == "admin")


def unauthorized(text: str) -> LmxError:
    """Return the 401."""
    return LmxError("invalid_api_key", text)
