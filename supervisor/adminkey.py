"""The admin key: made at the first start, never shown, never logged; everyone else gets its digest."""

import contextlib
import os
import stat
from pathlib import Path
from typing import Final

from protocol.config_load import BadConfigError
from protocol.keys import digest_of, new_key

VARIABLE: Final = "LMX_ADMIN_KEY"
#: A shorter one can be guessed.
_MIN_LENGTH: Final = 20
_MAX_LENGTH: Final = 1000


def admin_digest(file: Path) -> str:
    """Return the digest of the admin key in hexadecimal: of the variable, else of the file, which is made if missing.

    Raises `BadConfigError` for a key or file that is not fit, `OSError` if it cannot be made.
    """
    if VARIABLE in os.environ:
        return _digest(os.fsencode(os.environ[VARIABLE]), f"environment variable {VARIABLE}")
    with contextlib.suppress(FileExistsError):
        _make(file)
    return _digest(_read(file), str(file))


def _make(file: Path) -> None:
    """Make the file, whole or not at all; raise `FileExistsError` if it is there."""
    if os.path.lexists(file):
        raise FileExistsError
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(new_key().encode() + b"\n")
            stream.flush()
            os.fsync(descriptor)
        os.link(temporary, file)
    finally:
        temporary.unlink()


def _read(file: Path) -> bytes:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        msg = f"{file}: cannot be read: {error.strerror} (a link is refused)"
        raise BadConfigError(msg) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            msg = f"{file} must be a file of your own: remove it, and a new key is made"
            raise BadConfigError(msg)
        if status.st_mode & 0o077:
            msg = f"{file} can be read by others: run chmod 600 on it, or remove it, and a new key is made"
            raise BadConfigError(msg)
        return os.read(descriptor, _MAX_LENGTH + 2)
    finally:
        os.close(descriptor)


def _digest(key: bytes, place: str) -> str:
    key = key.strip()
    fine = _MIN_LENGTH <= len(key) <= _MAX_LENGTH and all(0x21 <= byte <= 0x7E for byte in key)
    if not fine:
        msg = f"{place}: an admin key has {_MIN_LENGTH} to {_MAX_LENGTH} printable ASCII characters without spaces"
        raise BadConfigError(msg)
    return digest_of(key).hex()
