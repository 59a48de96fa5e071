"""Clients that a proxy or bot names and signs for: `X-LMX-Client: ID;t=UNIX_TIME;n=NONCE;s=SIGNATURE`.

The signature is HMAC-SHA256, in hexadecimal, over all that stands before `;s=`. A header is good for a minute and for
one request. It says who is counted and noted; it opens nothing.
"""

import hmac
import re
from dataclasses import replace
from pathlib import Path
from typing import Final

from starlette.types import Scope

from gateway.auth import Access
from gateway.ids import looks_secret
from protocol.errors import LmxError
from protocol.logs import event
from protocol.secretfile import SecretFileError, read_secret

HEADER: Final = b"x-lmx-client"
_FORM: Final = re.compile(
    rb"(?P<signed>(?P<id>[A-Za-z0-9._@:/-]{1,64});t=(?P<time>[0-9]{1,12});n=[A-Za-z0-9_-]{8,64});s=(?P<mac>[0-9a-f]{64})"
)
#: Seconds by which the clocks of signer and gateway may differ, either way, and a header may be on its way.
MAX_AGE_S: Final = 60
#: Headers that are remembered against replay, each for twice that age: 500 requests a second, some 10 MB.
MAX_SEEN: Final = 65_536


class SignedClients:
    """Checks signatures and remembers which it saw. Without a secret whoever sends one is refused."""

    def __init__(self, secret: bytes | None, max_seen: int = MAX_SEEN) -> None:
        self._secret = secret
        self._max_seen = max_seen
        #: Signatures and when each may be forgotten, the oldest first.
        self._seen: dict[bytes, float] = {}

    def named(self, access: Access, scope: Scope, now: float) -> Access:
        """Return `access` as that of the client which the header names, if there is one; `now` is Unix time.

        Raises `invalid_client_signature` for a header that is not good, `access_check_failed` if nobody can tell.
        """
        found = [value for name, value in scope["headers"] if name == HEADER]
        if not found:
            return access
        if self._secret is None:
            text = "The secret that client ids are signed with cannot be read. The log of the gateway says why."
            raise LmxError("access_check_failed", text)
        if len(found) > 1:
            raise _bad("There is more than one X-LMX-Client header")
        form = _FORM.fullmatch(found[0])
        if form is None or looks_secret(form["id"], scope):
            raise _bad("X-LMX-Client is not ID;t=UNIX_TIME;n=NONCE;s=SIGNATURE")
        expected = hmac.digest(self._secret, form["signed"], "sha256").hex().encode("ascii")
        if not hmac.compare_digest(expected, form["mac"]):
            raise _bad("The signature of X-LMX-Client does not fit")
        if abs(now - int(form["time"])) > MAX_AGE_S:
            raise _bad(f"The time of X-LMX-Client is more than {MAX_AGE_S} s away from this machine's")
        self._remember(form["mac"], now)
        return replace(access, client=f"signed:{form['id'].decode('ascii')}")

    def _remember(self, mac: bytes, now: float) -> None:
        if mac in self._seen:
            raise _bad("X-LMX-Client was used before: sign each request anew")
        while self._seen and self._seen[oldest := next(iter(self._seen))] < now:
            del self._seen[oldest]
        if len(self._seen) >= self._max_seen:
            text = "More signed requests came within two minutes than can be told from repeated ones: try again later."
            raise LmxError("access_check_failed", text)
        self._seen[mac] = now + 2 * MAX_AGE_S


def signed_clients(file: str) -> SignedClients | None:
    """Return what checks signatures made with the secret in `file`; None if none is configured."""
    if not file:
        return None
    try:
        return SignedClients(read_secret(Path(file), "make another one"))
    except SecretFileError as error:
        event("client_secret_unreadable", level="ERROR", reason=str(error))
        return SignedClients(None)


def _bad(text: str) -> LmxError:
    return LmxError("invalid_client_signature", f"{text}.")
