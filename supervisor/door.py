"""Whether what is configured may be served at all: keys and profile, before anything listens."""

import ssl
import time
from pathlib import Path
from typing import Any

import msgspec

from protocol.config import Config
from protocol.config_load import BadConfigError
from protocol.keys import KeyFile, KeyStoreError
from protocol.paths import Home
from protocol.profiles import is_loopback, problems
from protocol.secretfile import SecretFileError, read_secret
from protocol.tracing import tracing_problems
from supervisor.adminkey import admin_digest


class _KeySet(msgspec.Struct):
    keys: list[dict[str, Any]]


def check_door(home: Home, config: Config) -> None:
    """Make the admin key if there is none; raise `BadConfigError` if the profile is broken."""
    try:
        digest = admin_digest(home.admin_key)
    except OSError:
        # A full disk must not keep a local server from serving; its admin routes then stay closed.
        digest = ""
    try:
        keys = KeyFile(home.keys).read()
    except KeyStoreError as error:
        if not is_loopback(config.gateway.host) or config.security.profile != "local":
            raise BadConfigError(str(error)) from None
        keys = ()
    now = time.time()
    usable = sum(not key.expired(now) for key in keys)
    found = problems(config, admin_key=bool(digest), inference_keys=usable) + tracing_problems(config.tracing)
    if config.security.jwt_keys and "://" not in config.security.jwt_keys:
        found += _key_file_problems(Path(config.security.jwt_keys))
    if config.security.client_secret_file:
        found += _client_secret_problems(config.security.client_secret_file)
    if config.security.tls_certificate and config.security.tls_key:
        found += _tls_problems(config)
    if found:
        raise BadConfigError("\n       ".join(found))


def _key_file_problems(file: Path) -> list[str]:
    """Return what is wrong with a file of public keys; what the keys are is for the gateway to see."""
    try:
        keys = msgspec.json.decode(file.read_bytes(), type=_KeySet).keys
    except OSError as error:
        return [f"security.jwt_keys: {file} cannot be read: {error.strerror}"]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return [f"security.jwt_keys: {file} is not a JSON Web Key Set"]
    return [] if keys else [f"security.jwt_keys: {file} has no keys"]


def _client_secret_problems(file: str) -> list[str]:
    if not file.startswith("/"):
        # Not quoted: somebody may have written the secret itself.
        return ["security.client_secret_file has to be the path of a file, and to begin with /"]
    try:
        read_secret(Path(file), "make another one: openssl rand -hex 32")
    except SecretFileError as error:
        return [f"security.client_secret_file: {error}"]
    return []


def _tls_problems(config: Config) -> list[str]:
    for key in ("tls_certificate", "tls_key"):
        try:
            Path(getattr(config.security, key)).open("rb").close()
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or "that is no path"
            return [f"security.{key}: {getattr(config.security, key)} cannot be read: {reason}"]
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # The password keeps OpenSSL from asking a terminal for one.
        context.load_cert_chain(config.security.tls_certificate, config.security.tls_key, password="")
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return [f"security.tls_certificate and security.tls_key cannot be used: {reason}"]
    return []
