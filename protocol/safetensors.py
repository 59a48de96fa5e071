"""The header of a safetensors file, checked without reading the weights.

The format (https://huggingface.co/docs/safetensors): 8 bytes of little-endian header length, that many bytes of
JSON (`{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, offsets in bytes from the end of the header),
then the tensors back to back. So the end of the last tensor has to be the end of the file, and a download that
broke off is found by reading a few kilobytes.
"""

import math
import os
from pathlib import Path
from typing import Any, Final

import msgspec

#: The reference implementation refuses longer headers too.
MAX_HEADER_BYTES: Final = 100_000_000
_PREFIX_BYTES: Final = 8
#: The product over a hostile shape of a million numbers would take minutes.
_MAX_DIMENSIONS: Final = 16
#: Bits of one element. A type that is not here (float8 variants come and go) is only checked for its place.
_DTYPE_BITS: Final = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
}


class SafetensorsError(Exception):
    """The file is not whole safetensors; the text says what is wrong, without the file's name."""


class SafetensorsHeader(msgspec.Struct, frozen=True):
    """What one file holds."""

    names: frozenset[str]
    #: Bytes of all tensors: the file without its header.
    weight_bytes: int


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of one file; raise `SafetensorsError` (content) or `OSError` (access)."""
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        prefix = file.read(_PREFIX_BYTES)
        if len(prefix) < _PREFIX_BYTES:
            msg = f"it ends after {len(prefix)} bytes, inside the header"
            raise SafetensorsError(msg)
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > MAX_HEADER_BYTES:
            msg = f"its header would be {header_bytes:,} bytes long, so this is not a safetensors file"
            raise SafetensorsError(msg)
        if _PREFIX_BYTES + header_bytes > file_bytes:
            msg = f"it is truncated: {file_bytes:,} bytes do not even hold the header of {header_bytes:,}"
            raise SafetensorsError(msg)
        raw = file.read(header_bytes)
    try:
        header = msgspec.json.decode(raw, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        msg = f"its header is not JSON ({error})"
        raise SafetensorsError(msg) from None
    header.pop("__metadata__", None)
    weight_bytes = _check_layout(header)
    expected = _PREFIX_BYTES + header_bytes + weight_bytes
    if expected > file_bytes:
        msg = f"it is truncated: {file_bytes:,} bytes of {expected:,}"
        raise SafetensorsError(msg)
    if expected < file_bytes:
        msg = f"it has {file_bytes - expected:,} bytes behind its last tensor"
        raise SafetensorsError(msg)
    return SafetensorsHeader(names=frozenset(header), weight_bytes=weight_bytes)


def _check_layout(header: dict[str, Any]) -> int:
    """Return the end of the last tensor, having seen that the tensors leave no gap and do not overlap."""
    places = sorted((*_place(name, entry), name) for name, entry in header.items())
    position = 0
    for begin, end, name in places:
        if begin != position:
            msg = f"tensor {name!r} begins at byte {begin:,} where {position:,} was expected"
            raise SafetensorsError(msg)
        position = end
    return position


def _place(name: str, entry: object) -> tuple[int, int]:
    """Return the tensor's begin and end, having seen that they agree with its type and shape."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
            len(shape) <= _MAX_DIMENSIONS
        ):
            pass
        case _:
            msg = f"tensor {name!r} has no dtype, shape and data_offsets"
            raise SafetensorsError(msg)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (begin, end, *shape)):
        msg = f"tensor {name!r} has a shape or place that is not made of natural numbers"
        raise SafetensorsError(msg)
    bits = _DTYPE_BITS.get(dtype)
    if end < begin or (bits is not None and (end - begin) * 8 != math.prod(shape) * bits):
        msg = f"tensor {name!r}: {dtype} {shape} does not fill bytes {begin:,} to {end:,}"
        raise SafetensorsError(msg)
    return begin, end
