"""One block of a prefix on disk: a header that says what it is, and its bytes. Any thread; no MLX.

magic, 4 bytes of little-endian header length, the header as msgpack, the payload. The header holds the hash of the
payload, the name of the block and what it is bound to: model, layout and versions. Files are written beside their
place and renamed; they are not synced, since one that a power failure emptied is found by its hash.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

SUFFIX: Final = ".kv"
TEMPORARY: Final = ".tmp"
_MAGIC: Final = b"lmx-kv/1"
_LENGTH_BYTES: Final = 4
_MAX_HEADER_BYTES: Final = 4096


class BadBlockError(Exception):
    """The file is not the block that it should be; the text says why, without its content."""


class _Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    binding: bytes
    name: bytes
    payload_bytes: int
    sha256: bytes


def path_of(folder: Path, name: bytes) -> Path:
    """Return where the block of that name lies."""
    return folder / f"{name.hex()}{SUFFIX}"


def name_of(file_name: str) -> bytes | None:
    """Return the name of the block in a file called so, None if it is none of ours."""
    stem, dot, suffix = file_name.rpartition(".")
    if f"{dot}{suffix}" != SUFFIX:
        return None
    try:
        return bytes.fromhex(stem)
    except ValueError:
        return None


def write_block(folder: Path, binding: bytes, name: bytes, payload: Sequence[memoryview]) -> int:
    """Write a block, private to this user; return the bytes of its file. Raises `OSError` and leaves nothing then."""
    digest = hashlib.sha256()
    for piece in payload:
        digest.update(piece)
    size = sum(piece.nbytes for piece in payload)
    header = msgspec.msgpack.encode(_Header(binding, name, size, digest.digest()))
    temporary = folder / f"{name.hex()}.{os.getpid()}{TEMPORARY}"
    head = _MAGIC + len(header).to_bytes(_LENGTH_BYTES, "little") + header
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "wb", buffering=0) as file:  # noqa: PTH123 - a descriptor with its own mode and flags
            for piece in (memoryview(head), *payload):
                _write_all(file.fileno(), piece)
        temporary.replace(path_of(folder, name))
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return len(head) + size


def read_block(folder: Path, binding: bytes, name: bytes, payload_bytes: int) -> memoryview:
    """Return the payload, which has so many bytes.

    Raises `BadBlockError` for a file that is damaged or another's, `OSError` if there is none.
    """
    begin = len(_MAGIC) + _LENGTH_BYTES
    most = begin + _MAX_HEADER_BYTES + payload_bytes
    # Opening a pipe would wait for its other end, and a link could lead to a device that never ends.
    try:
        descriptor = os.open(path_of(folder, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BadBlockError("it is a link") from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            raise BadBlockError("it is no file of a block's size")
        with open(descriptor, "rb", closefd=False) as file:
            data = memoryview(file.read(most))
    finally:
        os.close(descriptor)
    if bytes(data[: len(_MAGIC)]) != _MAGIC:
        raise BadBlockError("it is no block of a prefix")
    length = int.from_bytes(data[len(_MAGIC) : begin], "little")
    if length > _MAX_HEADER_BYTES or len(data) < begin + length:
        raise BadBlockError("its header is cut off")
    try:
        header = msgspec.msgpack.decode(data[begin : begin + length], type=_Header)
    except msgspec.MsgspecError:
        raise BadBlockError("its header is damaged") from None
    if (header.binding, header.name) != (binding, name):
        raise BadBlockError("it belongs to another model or prefix")
    payload = data[begin + length :]
    if not len(payload) == header.payload_bytes == payload_bytes:
        raise BadBlockError("it has another size than a block")
    if hashlib.sha256(payload).digest() != header.sha256:
        raise BadBlockError("its content is damaged")
    return payload


def _write_all(descriptor: int, piece: memoryview) -> None:
    while piece:
        written = os.write(descriptor, piece)  # a full disk first shows in a short write
        piece = piece[written:]
