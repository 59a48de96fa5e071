"""API keys: their form, what is stored of them, and the file they are stored in.

Only SHA-256 digests are stored: a key holds 256 random bits, so nothing slower is needed to keep it secret.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import msgspec

from protocol.statefile import StateFile, UnusableError

#: More keys than anybody hands out by hand.
MAX_KEYS: Final = 10_000
_FORM: Final = re.compile(rb"lmx-[A-Za-z0-9_-]{43}")
_SCHEMA: Final = 1


class KeyStoreError(Exception):
    """The stored keys cannot be used; the text says why and what to do."""


class KeyRecord(msgspec.Struct, frozen=True):
    """What is kept of a key. Limits: 0 is none, None the configured one; times are Unix time in seconds."""

    #: Names the key in logs and commands; not secret.
    id: str
    name: str
    #: SHA-256 in hexadecimal.
    digest: str
    created_at: float
    scope: Literal["inference", "admin"] = "inference"
    #: Ids of the models it may use; empty: all.
    models: tuple[str, ...] = ()
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    priority: int = 0
    expires_at: float | None = None

    def expired(self, now: float) -> bool:
        """Return whether its time is over at `now`."""
        return self.expires_at is not None and self.expires_at <= now


class _Document(msgspec.Struct, frozen=True):
    keys: tuple[KeyRecord, ...] = ()


def new_key() -> str:
    """Return a key that nobody has: `lmx-` and 43 characters."""
    return f"lmx-{secrets.token_urlsafe(32)}"


def looks_like_a_key(text: bytes) -> bool:
    """Return whether this is one of our keys by its form, known or not."""
    return _FORM.fullmatch(text) is not None


def digest_of(key: bytes) -> bytes:
    """Return what a key is compared and stored as."""
    return hashlib.sha256(key).digest()


class KeyFile:
    """The keys of one home. Reading takes the live file or nothing: an older one would bring back revoked keys."""

    def __init__(self, file: Path, sync: Callable[[int], None] = os.fsync) -> None:
        self._path = file
        self._file = StateFile(file, kind="lmx.keys", schema=_SCHEMA, sync=sync, keep_previous=False, private=True)

    def read(self) -> tuple[KeyRecord, ...]:
        """Return every key, oldest first, expired ones too; raise `KeyStoreError`."""
        try:
            return msgspec.convert(self._file.read(), _Document).keys
        except FileNotFoundError:
            return ()
        except (UnusableError, msgspec.ValidationError) as error:
            msg = f"{self._path}: {error}; bring back a good copy, or remove it and create the keys again"
            raise KeyStoreError(msg) from None

    def write(self, keys: tuple[KeyRecord, ...]) -> None:
        """Replace all keys; raise `OSError` if the disk does not take them."""
        self._file.save(_Document(keys))
