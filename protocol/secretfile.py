"""A secret that lies in a file of its own: read only if nobody else could have read or replaced it."""

import os
import stat
from pathlib import Path
from typing import Final

#: A shorter one can be guessed.
MIN_LENGTH: Final = 20
MAX_LENGTH: Final = 1000


class SecretFileError(Exception):
    """The secret cannot be used; the text says why and what to do, and never holds any of it."""


def read_secret(file: Path, cure: str) -> bytes:
    """Return the secret without white space around it; `cure` says what else helps, as "remove it, and …".

    Raises `SecretFileError` for a file that is a link, somebody else's or open to others, and for what is no secret.
    """
    try:
        secret = read_private(file, MAX_LENGTH + 2, cure).strip()
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "that is no path"
        msg = f"{file}: cannot be read: {reason} (a link is refused)"
        raise SecretFileError(msg) from None
    check_secret(secret, str(file))
    return secret


def read_private(file: Path, most: int, cure: str) -> bytes:
    """Return at most so many bytes of a file that nobody else can read or write, and that is no link.

    Raises `SecretFileError`, or `OSError` for a file that cannot be opened: `ELOOP` for a link.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            msg = f"{file} must be a file of your own: {cure}"
            raise SecretFileError(msg)
        if status.st_mode & 0o077:
            msg = f"{file} can be read by others: run chmod 600 on it, or {cure}"
            raise SecretFileError(msg)
        with open(descriptor, "rb", closefd=False) as stream:
            return stream.read(most)
    finally:
        os.close(descriptor)


def check_secret(secret: bytes, place: str) -> None:
    """Raise `SecretFileError` unless this could be one."""
    if not (MIN_LENGTH <= len(secret) <= MAX_LENGTH and all(0x21 <= byte <= 0x7E for byte in secret)):
        msg = f"{place}: it has to hold {MIN_LENGTH} to {MAX_LENGTH} printable ASCII characters without spaces"
        raise SecretFileError(msg)
