"""A llama-family GGUF becomes a model folder that `mlx_lm.load` reads."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import mlx.core as mx

from protocol.modelfolder import ModelFolderError, inspect_model_folder
from worker.gguf_file import GgufFile, read_gguf
from worker.gguf_llama import LlamaShape, MlxTensor
from worker.gguf_tensors import BITS, GROUP_SIZE, Weights, read_tensor
from worker.gguf_tokenizer import GgufTokenizer
from worker.safetensors_writer import SHARD_BYTES, TensorSpec, plan_shards, write_index, write_safetensors
from worker.staging import check_space, staged_folder
from worker.tool_errors import ImportFailed

__all__ = ["DTYPES", "Dtype", "ImportFailed", "Progress", "convert_gguf", "import_gguf"]

#: Called with (bytes done, bytes in all, what is being done).
Progress = Callable[[int, int, str], None]
Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: Final[dict[str, mx.Dtype]] = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
}
#: Room for the tokenizer and configuration beside the weights.
_SPARE_BYTES: Final = 64_000_000


def import_gguf(
    source: Path,
    destination: Path,
    *,
    dequantize: bool | None = None,
    dtype: Dtype | None = None,
    progress: Progress | None = None,
) -> Path:
    """Make the model folder `destination` of the file `source`, whole or not at all, and return it.

    By default weights become float32 on a machine without Metal, where nothing else is fast, and stay as they are
    on a Mac. `dtype` is that of everything not quantized. Raises `ImportFailed`.
    """
    with staged_folder(destination, ImportFailed) as staging:
        convert_gguf(source, staging, dequantize=dequantize, dtype=dtype, progress=progress)
    return destination


def convert_gguf(
    source: Path,
    folder: Path,
    *,
    dequantize: bool | None = None,
    dtype: Dtype | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the model's files into an existing folder; the caller makes that atomic. Raises `ImportFailed`."""
    gguf = read_gguf(source)
    shape = LlamaShape.of(gguf)
    tokenizer = GgufTokenizer(gguf)
    if len(tokenizer) > shape.vocab_size:
        msg = f"{source} is corrupt: {len(tokenizer):,} tokens, but embeddings for {shape.vocab_size:,}"
        raise ImportFailed("corrupt", msg)
    if dequantize is None:
        dequantize = dtype is not None or not mx.metal.is_available()
    target = DTYPES[dtype] if dtype else _default_dtype(gguf, dequantize=dequantize)
    writer = _Writer(gguf, shape.tensors(), target, progress, dequantize=dequantize)
    check_space(folder, writer.total_bytes + _SPARE_BYTES, ImportFailed)
    writer.write(folder, shard_bytes)

    config = {**shape.config(), **tokenizer.special_ids, "dtype": str(target).removeprefix("mlx.core.")}
    if not dequantize and (quantization := _quantization(gguf, shape.tensors())):
        config["quantization"] = quantization
    generation = {"_from_model_config": True, **tokenizer.special_ids}
    for name, value in {"config.json": config, "generation_config.json": generation}.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    tokenizer.write(folder, shape.context)
    try:
        inspect_model_folder(folder)
    except ModelFolderError as error:  # a mistake of ours, or of the disk: never hand it on
        raise ImportFailed("corrupt", f"the import of {source} came out wrong: {error.message}") from error


def _default_dtype(gguf: GgufFile, *, dequantize: bool) -> mx.Dtype:
    """Return float32 for a CPU; else what the matrices have (quantized ones have float16 scales)."""
    if dequantize and not mx.metal.is_available():
        return mx.float32
    kinds = {tensor.type.name for tensor in gguf.tensors.values() if len(tensor.shape) > 1}
    return {frozenset({"F32"}): mx.float32, frozenset({"BF16"}): mx.bfloat16}.get(frozenset(kinds), mx.float16)


def _quantization(gguf: GgufFile, tensors: list[MlxTensor]) -> dict[str, Any] | None:
    """Return mlx-lm's `quantization`: the commonest bits for all, exceptions by module."""
    bits = {
        tensor.mlx_name.removesuffix(".weight"): BITS.get(gguf.tensors[tensor.gguf_name].type.name)
        for tensor in tensors
        if len(gguf.tensors[tensor.gguf_name].shape) > 1
    }
    counts = Counter(each for each in bits.values() if each is not None)
    if not counts:
        return None
    common = counts.most_common(1)[0][0]
    exceptions = {
        module: {"group_size": GROUP_SIZE, "bits": each} if each else False
        for module, each in bits.items()
        if each != common
    }
    return {"group_size": GROUP_SIZE, "bits": common, **exceptions}


class _Writer:
    """Carries the tensors over, one at a time."""

    def __init__(
        self,
        gguf: GgufFile,
        tensors: list[MlxTensor],
        dtype: mx.Dtype,
        progress: Progress | None,
        *,
        dequantize: bool,
    ) -> None:
        self._gguf = gguf
        self._dtype = dtype
        self._dequantize = dequantize
        self._progress = progress
        self._sources: dict[str, tuple[MlxTensor, str]] = {}
        self._specs = [spec for tensor in tensors for spec in self._plan(tensor)]
        self._last: tuple[MlxTensor, Weights] | None = None
        self.total_bytes = sum(spec.nbytes for spec in self._specs)

    def write(self, folder: Path, shard_bytes: int) -> None:
        """Write all weight files and their index."""
        shards = plan_shards(self._specs, shard_bytes)
        done = 0
        with self._gguf.path.open("rb") as file:

            def produce(spec: TensorSpec) -> mx.array:
                nonlocal done
                if self._progress:
                    self._progress(done, self.total_bytes, "convert")
                done += spec.nbytes
                tensor, part = self._sources[spec.name]
                if self._last is None or self._last[0] is not tensor:
                    weights = read_tensor(file, self._gguf.tensors[tensor.gguf_name])
                    self._last = (tensor, weights.unpermuted(tensor.heads) if tensor.heads else weights)
                return self._part(self._last[1], part)

            for name, specs in shards.items():
                write_safetensors(folder / name, specs, produce)
        write_index(folder, shards)
        if self._progress:
            self._progress(self.total_bytes, self.total_bytes, "convert")

    def _part(self, weights: Weights, part: str) -> mx.array:
        if self._dequantize or weights.scales is None or weights.biases is None:
            return weights.dequantized(self._dtype)
        if part == "weight":
            return weights.weight
        return (weights.scales if part == "scales" else weights.biases).astype(self._dtype)

    def _plan(self, tensor: MlxTensor) -> list[TensorSpec]:
        """Return the one spec of a plain tensor, or the three of one that stays quantized."""
        shape = self._gguf.tensors[tensor.gguf_name].shape
        bits = BITS.get(self._gguf.tensors[tensor.gguf_name].type.name)
        if self._dequantize or bits is None:
            parts = {"weight": (self._dtype, shape)}
        else:
            *rows, columns = shape
            groups = (*rows, columns // GROUP_SIZE)
            parts = {
                "weight": (mx.uint32, (*rows, columns * bits // 32)),
                "scales": (self._dtype, groups),
                "biases": (self._dtype, groups),
            }
        specs = []
        for part, (dtype, part_shape) in parts.items():
            name = tensor.mlx_name.removesuffix("weight") + part
            self._sources[name] = (tensor, part)
            specs.append(TensorSpec(name, dtype, part_shape, math.prod(part_shape) * dtype.size))
        return specs
