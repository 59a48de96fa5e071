"""Who an identity provider says somebody is: JSON Web Tokens, checked against its public keys. Extra `lmx[jwt]`."""

import hashlib
import re
from typing import Any, Final

import jwt

from gateway.auth import Access, unauthorized
from gateway.jwks import KeySet, NoKeysError, PublicKey
from protocol.config import SecurityConfig
from protocol.errors import LmxError

#: Clocks of two machines differ.
_LEEWAY_S: Final = 30
_MAX_BYTES: Final = 8 * 1024
_TEXT: Final = re.compile(r"[A-Za-z0-9._@|:+-]{1,64}")
_REFUSED: Final = "That token is not good here: "
#: What went wrong, in words that help an honest client and tell a forger nothing; the first that fits.
_WORDS: Final[tuple[tuple[type[Exception], str], ...]] = (
    (jwt.ExpiredSignatureError, "its time is over."),
    (jwt.ImmatureSignatureError, "its time has not come."),
    (jwt.InvalidAudienceError, "it is for another audience."),
    (jwt.InvalidIssuerError, "it is of another issuer."),
    (jwt.MissingRequiredClaimError, "a claim is missing that it must have (exp, iss, aud, sub)."),
    (jwt.InvalidAlgorithmError, "its algorithm is not allowed."),
)


class TokenVerifier:
    """Checks tokens as `[security] jwt_*` says."""

    def __init__(self, config: SecurityConfig, keys: KeySet | None = None) -> None:
        self._config = config
        self._keys = keys or KeySet(config.jwt_keys)

    async def access(self, token: bytes) -> Access:
        """Return what the bearer of a token may do; raise 401 for one that is not good, 503 if nobody can tell."""
        if len(token) > _MAX_BYTES:
            raise unauthorized(f"{_REFUSED}it is too long.")
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError:
            raise unauthorized(f"{_REFUSED}it cannot be read.") from None
        algorithm, kid = header.get("alg"), header.get("kid", "")
        # Before any key is looked at: `none`, and HMAC with a public key as its secret, end here.
        if algorithm not in self._config.jwt_algorithms or not isinstance(kid, str):
            raise unauthorized(f"{_REFUSED}its algorithm is not allowed.")
        try:
            key = await self._keys.find(kid)
        except NoKeysError:
            text = "The keys of the identity provider cannot be had, so no token can be checked. The log says why."
            raise LmxError("access_check_failed", text) from None
        if key is None or not key.fits(algorithm):
            raise unauthorized(f"{_REFUSED}it is signed with a key that is not known.")
        return self._access(self._claims(token, key, algorithm))

    def _claims(self, token: bytes, key: PublicKey, algorithm: str) -> dict[str, Any]:
        try:
            return jwt.decode(
                token,
                key.key,
                algorithms=[algorithm],
                audience=self._config.jwt_audience,
                issuer=self._config.jwt_issuer,
                leeway=_LEEWAY_S,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.PyJWTError as error:
            words = next((words for kind, words in _WORDS if isinstance(error, kind)), "its signature is wrong.")
            raise unauthorized(_REFUSED + words) from None

    def _access(self, claims: dict[str, Any]) -> Access:
        scopes = _scopes(claims)
        needed, admin = self._config.jwt_scope, self._config.jwt_admin_scope
        is_admin = bool(admin) and admin in scopes
        if needed and needed not in scopes and not is_admin:
            raise LmxError("forbidden", f"That token has not the scope '{needed}', which this server wants.")
        return Access(f"jwt:{_shown(claims['sub'])}", admin=is_admin, token=True)


def _scopes(claims: dict[str, Any]) -> set[str]:
    """Return the scopes of a token: one text, or a list, by either of their usual names."""
    found: set[str] = set()
    for name in ("scope", "scp"):
        value = claims.get(name)
        if isinstance(value, str):
            found |= set(value.split())
        elif isinstance(value, list):
            found |= {item for item in value if isinstance(item, str)}
    return found


def _shown(subject: object) -> str:
    """Return a name for limits and logs: the subject's own if it is harmless, else a digest of it."""
    text = str(subject)
    return text if _TEXT.fullmatch(text) else hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
