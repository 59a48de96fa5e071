"""Reading a GGUF file without trusting it.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. MLX has a reader too, but in C and with a
history of reading and writing outside its buffers on crafted files (CVE-2025-62609, mlx#4136, #4213, #4245); an
import takes files from anywhere, so every count, length and offset is checked here before anything is allocated.
"""

import math
import os
import struct
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from worker.tool_errors import ImportFailed

MAX_HEADER_BYTES: Final = 256_000_000
MAX_KEYS: Final = 65_536
MAX_TENSORS: Final = 100_000
MAX_STRING_BYTES: Final = 16_000_000
MAX_ARRAY_ITEMS: Final = 5_000_000
_MAX_DIMENSIONS: Final = 4
_DEFAULT_ALIGNMENT: Final = 32
_MAX_ALIGNMENT: Final = 65_536
_VERSIONS: Final = (2, 3)

_STRING: Final = 8
_ARRAY: Final = 9
#: Value type to struct format; little-endian is the only byte order that is read.
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

Scalar = int | float | bool | str
Value = Scalar | list[Scalar]


class TensorType(msgspec.Struct, frozen=True):
    """How elements are stored: `block` of them in `block_bytes`."""

    name: str
    block: int
    block_bytes: int


#: The types whose decoding is written and tested (gguf_tensors.py), by their ggml number.
TENSOR_TYPES: Final = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    8: TensorType("Q8_0", 32, 34),
    30: TensorType("BF16", 1, 2),
}
_OTHER_TYPES: Final = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4",
}  # fmt: skip


class GgufTensor(msgspec.Struct, frozen=True):
    """Where one tensor lies."""

    name: str
    #: Rows first, as MLX has it (the file has the fastest dimension first).
    shape: tuple[int, ...]
    type: TensorType
    #: In bytes from the start of the file.
    offset: int
    nbytes: int


class GgufFile(msgspec.Struct, frozen=True):
    """A GGUF whose header is sound and whose tensors all lie inside the file."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header, not the weights; raise `ImportFailed` for anything that is not a whole GGUF."""
    try:
        with path.open("rb") as file:
            return _Reader(path, file).read()
    except FileNotFoundError:
        raise ImportFailed("missing", f"{path} does not exist") from None
    except IsADirectoryError:
        raise ImportFailed("not_gguf", f"{path} is a folder, not a GGUF file") from None
    except OSError as error:
        raise ImportFailed("io", f"{path} cannot be read: {error.strerror or error}") from None


class _Reader:
    """One pass over the header."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._position = 0

    def read(self) -> GgufFile:
        magic = self._file.read(4)
        self._position = len(magic)
        if magic != b"GGUF":
            raise ImportFailed("not_gguf", f"{self._path} is not a GGUF file (it begins with {magic!r})")
        (version,) = self._unpack("I")
        if version not in _VERSIONS:
            raise ImportFailed("unsupported", f"{self._path} is GGUF version {version}; 2 and 3 are supported")
        tensor_count, key_count = self._unpack("QQ")
        if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
            raise self._corrupt(f"claims {tensor_count:,} tensors and {key_count:,} keys")
        metadata: dict[str, Value] = {}
        for _ in range(key_count):
            key = self._string()
            metadata[key] = self._value(key)
        places = [self._tensor_place() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= _MAX_ALIGNMENT or alignment % 8:
            raise self._corrupt(f"has the alignment {alignment!r}")
        data_start = -(-self._position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in places:
            if name in tensors:
                raise self._corrupt(f"has two tensors named {name!r}")
            tensors[name] = self._locate(name, shape, kind, data_start + offset)
        return GgufFile(self._path, metadata, tensors)

    def _corrupt(self, what: str) -> ImportFailed:
        return ImportFailed("corrupt", f"{self._path} is corrupt: it {what}")

    def _take(self, count: int) -> bytes:
        if self._position + count > MAX_HEADER_BYTES:
            raise self._corrupt(f"has a header longer than {MAX_HEADER_BYTES:,} bytes")
        data = self._file.read(count) if self._position + count <= self._size else b""
        if len(data) < count:
            what = f"the file ends at {self._size:,} bytes, inside its header: copy or download it again"
            raise ImportFailed("corrupt", f"{self._path} is truncated: {what}")
        self._position += count
        return data

    def _unpack(self, fields: str) -> tuple[int, ...]:
        return struct.unpack("<" + fields, self._take(struct.calcsize("<" + fields)))

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        if length > MAX_STRING_BYTES:
            raise self._corrupt(f"has a string of {length:,} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise self._corrupt(f"has a string that is not UTF-8 before byte {self._position:,}") from None

    def _value(self, key: str) -> Value:
        (kind,) = self._unpack("I")
        if kind != _ARRAY:
            return self._scalars(key, kind, 1)[0]
        item_kind, count = self._unpack("IQ")
        if count > MAX_ARRAY_ITEMS:
            raise self._corrupt(f"has {count:,} items in {key!r}")
        return self._scalars(key, item_kind, count)

    def _scalars(self, key: str, kind: int, count: int) -> list[Scalar]:
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        if kind not in _SCALARS:  # an array in an array too: nothing that is imported uses one
            raise self._corrupt(f"has a value of unknown type {kind} in {key!r}")
        return list(self._unpack(f"{count}{_SCALARS[kind]}"))

    def _tensor_place(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (dimensions,) = self._unpack("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._corrupt(f"has a tensor {name!r} of {dimensions} dimensions")
        shape = tuple(reversed(self._unpack(f"{dimensions}Q")))
        kind, offset = self._unpack("IQ")
        return name, shape, kind, offset

    def _locate(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        if kind not in TENSOR_TYPES:
            known = ", ".join(each.name for each in TENSOR_TYPES.values())
            what = _OTHER_TYPES.get(kind, f"number {kind}")
            msg = f"{self._path}: the tensor {name!r} has the type {what}; supported are {known}"
            raise ImportFailed("unsupported", msg)
        tensor_type = TENSOR_TYPES[kind]
        count = math.prod(shape)
        if count == 0 or shape[-1] % tensor_type.block:
            raise self._corrupt(f"has a tensor {name!r} of shape {shape}, which {tensor_type.name} cannot hold")
        nbytes = count // tensor_type.block * tensor_type.block_bytes
        if offset + nbytes > self._size:
            msg = (
                f"{self._path} is truncated: the tensor {name!r} ends at byte {offset + nbytes:,}, the file at "
                f"{self._size:,}: copy or download it again"
            )
            raise ImportFailed("corrupt", msg)
        return GgufTensor(name, shape, tensor_type, offset, nbytes)
