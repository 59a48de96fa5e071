"""The security profiles: one table of what each demands, and what a configuration lacks for its own."""

import importlib.util
import ipaddress
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec

from protocol.config import Config, LimitsConfig, SecurityConfig

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Of tokens: signatures with a public half only. `none` and HMAC are not among them and cannot be configured.
JWT_ALGORITHMS: Final = (
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
)  # fmt: skip
#: Requests a minute of one client, where the profile limits them.
INFERENCE_PER_MINUTE: Final = 60
ADMIN_PER_MINUTE: Final = 10
_ORIGIN: Final = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_HOST: Final = re.compile(r"[a-z0-9._-]{1,253}")


class Profile(msgspec.Struct, frozen=True):
    """One row. The admin key guards `/admin` in every profile and is in no column."""

    #: It listens on loopback only.
    loopback_only: bool
    #: `/v1` cannot be had without a key, whatever else is configured, and a start without any key fails.
    keys_required: bool
    #: What `cors_origins = ["auto"]` means; None: the origins have to be chosen.
    cors: Literal["none", "any"] | None
    #: `cors_origins` and `allowed_hosts` may be `["*"]`.
    wildcards: bool
    #: Only trusted proxies and this machine itself may connect; without TLS, or in any case.
    behind_proxy: Literal["no", "without TLS", "always"]
    #: Whether the limits on requests have defaults.
    limits: bool


PROFILES: Final[Mapping[str, Profile]] = MappingProxyType(
    {
        "local": Profile(
            loopback_only=True, keys_required=False, cors="none", wildcards=True, behind_proxy="no", limits=False
        ),
        "lan": Profile(
            loopback_only=False, keys_required=False, cors="any", wildcards=True, behind_proxy="no", limits=True
        ),
        "trusted-gateway": Profile(
            loopback_only=False, keys_required=True, cors="none", wildcards=False, behind_proxy="always", limits=True
        ),
        "internet": Profile(
            loopback_only=False, keys_required=True, cors=None, wildcards=False, behind_proxy="without TLS", limits=True
        ),
    }
)


class Rules(NamedTuple):
    """What a configuration and its profile come to. Limits: 0 is none."""

    keys_required: bool
    proxies: tuple[Network, ...]
    proxies_only: bool
    hosts: tuple[str, ...]
    origins: tuple[str, ...]
    inference_per_minute: int
    admin_per_minute: int
    tokens_per_minute: int
    concurrent_requests: int
    #: Whether `/metrics` needs no key.
    metrics_open: bool = False


def rules(security: SecurityConfig, limits: LimitsConfig) -> Rules:
    """Return the rules of a configuration that has no `problems`. Raises `ValueError` for a network that is none."""
    profile = PROFILES[security.profile]
    origins = security.cors_origins
    if origins == ("auto",):
        origins = ("*",) if profile.cors == "any" else ()
    return Rules(
        keys_required=profile.keys_required or security.inference_keys == "required",
        proxies=tuple(ipaddress.ip_network(text) for text in security.trusted_proxies),
        proxies_only=_proxies_only(security),
        hosts=security.allowed_hosts,
        origins=origins,
        inference_per_minute=_limit(limits.inference_per_minute, INFERENCE_PER_MINUTE, profile),
        admin_per_minute=_limit(limits.admin_per_minute, ADMIN_PER_MINUTE, profile),
        tokens_per_minute=limits.tokens_per_minute,
        concurrent_requests=limits.concurrent_requests,
        metrics_open=profile.loopback_only and security.inference_keys != "required",
    )


def problems(config: Config, *, admin_key: bool, inference_keys: int) -> list[str]:
    """Return what keeps this configuration from being served, each in words that say what to change.

    `admin_key`: there is one. `inference_keys`: how many there are that are valid now.
    """
    security = config.security
    name, profile = security.profile, PROFILES[security.profile]
    found = [*_malformed(security)]
    beyond = not is_loopback(config.gateway.host)
    if profile.loopback_only and beyond:
        found.append(
            f"profile {name} listens on this machine only, and gateway.host is {config.gateway.host!r}: "
            "set security.profile to lan, trusted-gateway or internet, or gateway.host to 127.0.0.1"
        )
    if not admin_key and (beyond or not profile.loopback_only):
        found.append(f"profile {name} needs an admin key: make $LMX_HOME/admin.key usable, or set LMX_ADMIN_KEY")
    if profile.keys_required:
        if security.inference_keys == "optional":
            found.append(f"profile {name} needs keys for inference: security.inference_keys may not be optional")
        if not inference_keys and not security.jwt_keys:
            found.append(f"profile {name} needs a key for inference: lmx-supervisor keys create --name NAME")
    found += _jwt_problems(security, profile)
    if profile.cors is None and security.cors_origins == ("auto",):
        found.append(
            f"profile {name} needs a choice of web pages: set security.cors_origins to their origins, or to []"
        )
    if not profile.wildcards:
        found += [
            f"security.{key} may not hold '*' in profile {name}: name them one by one"
            for key in ("cors_origins", "allowed_hosts")
            if "*" in getattr(security, key)
        ]
    if _proxies_only(security) and not security.trusted_proxies:
        tls = "set security.tls_certificate and security.tls_key, or " if profile.behind_proxy == "without TLS" else ""
        found.append(
            f"profile {name} is for clients that come through a proxy: {tls}set security.trusted_proxies to its network"
        )
    return found


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a listening address. A name other than `localhost` may mean any."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _proxies_only(security: SecurityConfig) -> bool:
    rule = PROFILES[security.profile].behind_proxy
    return rule == "always" or (rule == "without TLS" and not security.tls_certificate)


def _limit(configured: int, default: int, profile: Profile) -> int:
    if configured >= 0:
        return configured
    return default if profile.limits else 0


def _malformed(security: SecurityConfig) -> list[str]:
    found = [f"security.trusted_proxies: {wrong}" for text in security.trusted_proxies if (wrong := _not_proxies(text))]
    if "auto" in security.cors_origins and len(security.cors_origins) > 1:
        found.append("security.cors_origins: 'auto' stands alone")
    found += [
        f"security.cors_origins: {text!r} is not an origin: write it as https://chat.example.com, in small letters, "
        "without a path and without '*' in it"
        for text in security.cors_origins
        if text not in {"auto", "*"} and not _ORIGIN.fullmatch(text)
    ]
    found += [
        f"security.allowed_hosts: {text!r} is not a host name: small letters, without a port and without '*' in it"
        for text in security.allowed_hosts
        if text != "*" and not _HOST.fullmatch(text)
    ]
    if bool(security.tls_certificate) != bool(security.tls_key):
        found.append("security.tls_certificate and security.tls_key belong together: set both or none")
    return found


def _jwt_problems(security: SecurityConfig, profile: Profile) -> list[str]:
    """Return what is wrong with the configuration of tokens, each in words."""
    parts = {name: getattr(security, name) for name in ("jwt_issuer", "jwt_audience", "jwt_keys")}
    if not any(parts.values()):
        if security.jwt_scope or security.jwt_admin_scope:
            return ["security.jwt_scope and jwt_admin_scope need security.jwt_issuer, jwt_audience and jwt_keys"]
        return []
    found = [f"security.{name} is missing: tokens need issuer, audience and keys" for name, v in parts.items() if not v]
    if not profile.keys_required and security.inference_keys == "auto":
        found.append(
            "with tokens it has to be said whether everybody needs one, or an API key: set security.inference_keys to "
            "required or optional"
        )
    found += [
        f"security.jwt_algorithms: {name!r} is not allowed: choose of {', '.join(JWT_ALGORITHMS)}"
        for name in security.jwt_algorithms
        if name not in JWT_ALGORITHMS
    ]
    if not security.jwt_algorithms:
        found.append("security.jwt_algorithms is empty: name at least one")
    if not _is_trusted_place(security.jwt_keys):
        found.append("security.jwt_keys: keys come over https, from a file (/…), or over http from this machine itself")
    if not all(importlib.util.find_spec(module) for module in ("jwt", "cryptography")):
        found.append('security.jwt_keys needs the extra: pip install "lmx[jwt]"')
    return found


def _is_trusted_place(place: str) -> bool:
    parts = urlsplit(place)
    if parts.scheme in {"http", "https"}:
        return bool(parts.hostname) and (parts.scheme == "https" or is_loopback(parts.hostname or ""))
    return place.startswith("/")


def _not_proxies(text: str) -> str:
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        return str(error)
    return "" if network.prefixlen else f"{text} is everybody: name the network of the proxies"
