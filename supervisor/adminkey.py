"""The admin key: made at the first start, never shown, never logged; everyone else gets its digest."""

import contextlib
import os
from pathlib import Path
from typing import Final

from protocol.config_load import BadConfigError
from protocol.keys import digest_of, new_key
from protocol.secretfile import SecretFileError, check_secret, read_secret

VARIABLE: Final = "LMX_ADMIN_KEY"


def admin_digest(file: Path) -> str:
    """Return the digest of the admin key in hexadecimal: of the variable, else of the file, which is made if missing.

    Raises `BadConfigError` for a key or file that is not fit, `OSError` if it cannot be made.
    """
    try:
        if VARIABLE in os.environ:
            key = os.fsencode(os.environ[VARIABLE]).strip()
            check_secret(key, f"environment variable {VARIABLE}")
        else:
            with contextlib.suppress(FileExistsError):
                _make(file)
            key = read_secret(file, "remove it, and a new key is made")
    except SecretFileError as error:
        raise BadConfigError(str(error)) from None
    return digest_of(key).hex()


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
