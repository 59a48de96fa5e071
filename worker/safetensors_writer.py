"""Writing safetensors one tensor at a time, so that an import needs the memory of its largest tensor only."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import mlx.core as mx
import msgspec

#: The hub's convention; above it a folder has several files and an index.
SHARD_BYTES: Final = 5_000_000_000
_DTYPE_NAMES: Final = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32"}
_ALIGNMENT: Final = 8


class TensorSpec(msgspec.Struct, frozen=True):
    """A tensor that will be written."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]
    nbytes: int


def plan_shards(specs: Sequence[TensorSpec], shard_bytes: int = SHARD_BYTES) -> dict[str, list[TensorSpec]]:
    """Return file name to tensors, in order; a tensor is never split."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05}-of-{len(shards):05}.safetensors": shard for n, shard in enumerate(shards, 1)}


def write_index(folder: Path, shards: dict[str, list[TensorSpec]]) -> None:
    """Write model.safetensors.index.json, if there is more than one file."""
    if len(shards) < 2:
        return
    index = {
        "metadata": {"total_size": sum(spec.nbytes for shard in shards.values() for spec in shard)},
        "weight_map": {spec.name: name for name, shard in shards.items() for spec in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def write_safetensors(path: Path, specs: Sequence[TensorSpec], produce: Callable[[TensorSpec], mx.array]) -> None:
    """Write one file; `produce` is asked for each tensor in order, and what it returned is let go at once."""
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    position = 0
    for spec in specs:
        end = position + spec.nbytes
        header[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": [position, end],
        }
        position = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for spec in specs:
            array = produce(spec)
            assert (array.dtype, tuple(array.shape)) == (spec.dtype, spec.shape), spec.name
            data = mx.contiguous(array).reshape(-1).view(mx.uint8)
            mx.eval(data)
            file.write(memoryview(data))  # type: ignore[arg-type]  # the stubs know no buffers
