"""GGUF's blocks as MLX arrays.

ggml stores 32 elements as a block: a float16 scale (Q4_1: and a minimum), then the quants. Four-bit blocks hold
element i in the low and element i + 16 in the high half of byte i. MLX wants the quants in order, packed into
uint32 from the lowest bits up, and scales and biases as arrays of their own, with value = scale * quant + bias.
`mx.load` gives the same arrays for the same file; the tests compare them bit by bit.
"""

from io import BufferedReader
from typing import Final

import mlx.core as mx
import msgspec

from worker.gguf_file import GgufTensor
from worker.tool_errors import ImportFailed

GROUP_SIZE: Final = 32
#: The types that stay quantized, with MLX's bits.
BITS: Final = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
_FLOATS: Final = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
_SCALE_BYTES: Final = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2}


class Weights(msgspec.Struct, frozen=True):
    """A matrix or vector: plain (`scales` is None), or packed uint32 with scales and biases per group of 32."""

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bits: int = 0

    def dequantized(self, dtype: mx.Dtype) -> mx.array:
        """Return plain numbers; the arithmetic is done in float32 whatever the result."""
        if self.scales is None or self.biases is None:
            return self.weight.astype(dtype)
        scales, biases = self.scales.astype(mx.float32), self.biases.astype(mx.float32)
        return mx.dequantize(self.weight, scales, biases, group_size=GROUP_SIZE, bits=self.bits).astype(dtype)

    def unpermuted(self, heads: int) -> "Weights":
        """Undo llama.cpp's order of the q and k rows, which pairs neighbours for its rotary embedding.

        Hugging Face and MLX pair row i with row i + half of the head. Only rows move, so packed ones move too.
        """
        scales = None if self.scales is None else _unpermute(self.scales, heads)
        biases = None if self.biases is None else _unpermute(self.biases, heads)
        return Weights(_unpermute(self.weight, heads), scales, biases, self.bits)


def read_tensor(file: BufferedReader, tensor: GgufTensor) -> Weights:
    """Read one tensor from an open GGUF."""
    raw = bytearray(tensor.nbytes)
    file.seek(tensor.offset)
    if file.readinto(raw) != tensor.nbytes:
        raise ImportFailed("corrupt", f"the file became shorter while it was read, at {tensor.name!r}")
    data = mx.array(memoryview(raw))  # type: ignore[arg-type]  # the stubs know no buffers; this copies
    if tensor.type.name in _FLOATS:
        return Weights(data.view(_FLOATS[tensor.type.name]).reshape(tensor.shape))
    return _quantized(data, tensor)


def _quantized(data: mx.array, tensor: GgufTensor) -> Weights:
    kind, rows = tensor.type.name, tensor.shape[:-1]
    blocks = data.reshape(-1, tensor.type.block_bytes)
    head = mx.contiguous(blocks[:, : _SCALE_BYTES[kind]]).view(mx.float16)
    quants = blocks[:, _SCALE_BYTES[kind] :]
    scales = head[:, :1]
    if kind == "Q8_0":
        packed = quants ^ 0x80  # signed to unsigned: q + 128
        biases = scales * -128
    else:
        ordered = mx.concatenate([quants & 0x0F, quants >> 4], axis=1)
        packed = ordered[:, 0::2] | (ordered[:, 1::2] << 4)
        biases = head[:, 1:2] if kind == "Q4_1" else scales * -8
    weight = mx.contiguous(packed).view(mx.uint32).reshape(*rows, -1)
    return Weights(weight, scales.reshape(*rows, -1), biases.reshape(*rows, -1), BITS[kind])


def _unpermute(rows: mx.array, heads: int) -> mx.array:
    count, *rest = rows.shape
    return rows.reshape(heads, count // heads // 2, 2, *rest).swapaxes(1, 2).reshape(count, *rest)
