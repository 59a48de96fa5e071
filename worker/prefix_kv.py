"""Keys and values of prefixes: cut out of a running batch in blocks, and put together again. Main thread only.

Only plain caches (`KVCache` in every layer) are cut: what a block of tokens left in them does not depend on what comes
after. A block is one array (parts, heads, tokens, dim) for each kind of part a model has, which is one for nearly all
models: few buffers, and few copies. Its numbers are kept as unsigned integers of the same width, since Python's buffers
know no bfloat16.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache

from worker.prefix_chain import BLOCK_TOKENS

_RAW: Final = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
_NUMPY: Final = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_ROW_AXES: Final = 4


class _Kind(NamedTuple):
    """Parts of one form. `parts`: 2 * layer for its keys, and one more for its values."""

    dtype: mx.Dtype
    heads: int
    dim: int
    parts: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.parts), self.heads, BLOCK_TOKENS, self.dim)

    @property
    def nbytes(self) -> int:
        return len(self.parts) * self.heads * BLOCK_TOKENS * self.dim * self.dtype.size


class Layout:
    """What a block of one model looks like; cuts and joins. Made by `probe`."""

    def __init__(self, kinds: Sequence[_Kind], layers: int) -> None:
        self._kinds = tuple(kinds)
        self._layers = layers
        #: Bytes of one block.
        self.block_bytes = sum(kind.nbytes for kind in self._kinds)

    @property
    def description(self) -> str:
        """Say it in a line: blocks of another description are another model's."""
        return ";".join(f"{kind.dtype}{kind.shape}{kind.parts}" for kind in self._kinds)

    def cut(self, layers: Sequence[Any], row: int, tokens: int, first: int, count: int) -> list[tuple[mx.array, ...]]:
        """Return `count` blocks from block `first` on, of a row of a batch that holds `tokens`; nothing if it does not.

        The arrays are computed, and share no memory with the batch.
        """
        if len(layers) != self._layers or not all(type(layer) is BatchKVCache for layer in layers):
            return []
        begins = [int(padding[row]) for padding in _numbers([layer.left_padding for layer in layers])]
        if any(layer._idx - begin != tokens for layer, begin in zip(layers, begins, strict=True)):  # noqa: SLF001
            return []
        if any(layer._right_padding is not None for layer in layers):  # noqa: SLF001 - not in its place yet
            return []
        blocks = []
        for number in range(first, first + count):
            kinds = []
            for kind in self._kinds:
                pieces = []
                for part in kind.parts:
                    layer, begin = layers[part // 2], begins[part // 2] + number * BLOCK_TOKENS
                    array = layer.values if part % 2 else layer.keys
                    piece = array[row : row + 1, :, begin : begin + BLOCK_TOKENS, :]
                    if piece.dtype != kind.dtype or piece.shape != (1, *kind.shape[1:]):
                        return []
                    pieces.append(piece.view(_RAW[kind.dtype.size]))
                kinds.append(mx.concatenate(pieces, axis=0))
            blocks.append(tuple(kinds))
        mx.eval(blocks)
        return blocks

    def join(self, blocks: Sequence[tuple[mx.array, ...]], tokens: int) -> list[KVCache]:
        """Return a cache of the first `tokens` tokens of these blocks, which go with the last block at the latest."""
        layers = [KVCache() for _ in range(self._layers)]
        for index, kind in enumerate(self._kinds):
            pieces = [block[index].view(kind.dtype) for block in blocks]
            for place, part in enumerate(kind.parts):
                array = mx.concatenate([piece[place : place + 1] for piece in pieces], axis=2)
                if part % 2:
                    layers[part // 2].values = array
                else:
                    layers[part // 2].keys = array
        for layer in layers:
            layer.offset = tokens
        mx.eval([(layer.keys, layer.values) for layer in layers])
        return layers

    def holds(self, layers: Sequence[KVCache], tokens: int) -> bool:
        """Return whether a joined cache is what it should be: so many tokens in every layer, and room for them."""
        return len(layers) == self._layers and all(
            layer.offset == tokens
            and layer.keys is not None
            and layer.values is not None
            and layer.keys.shape[2] == layer.values.shape[2] >= tokens
            for layer in layers
        )

    def to_bytes(self, data: tuple[mx.array, ...]) -> list[memoryview]:
        """Return the memory of a block, without a copy."""
        return [memoryview(array).cast("B") for array in data]  # type: ignore[arg-type]  # the stubs know no buffers

    def from_bytes(self, payload: memoryview) -> tuple[mx.array, ...]:
        """Return the block whose bytes these are; raise `ValueError` if there are not as many as it has."""
        if len(payload) != self.block_bytes:
            msg = f"a block has {self.block_bytes} bytes, not {len(payload)}"
            raise ValueError(msg)
        arrays, begin = [], 0
        for kind in self._kinds:
            end = begin + kind.nbytes
            raw = np.frombuffer(payload[begin:end], dtype=_NUMPY[kind.dtype.size])
            arrays.append(mx.array(raw.reshape(kind.shape)))
            begin = end
        mx.eval(arrays)
        return tuple(arrays)


def probe(model: Any) -> Layout | None:
    """Run a model on one token; return what its blocks look like, None if its caches cannot be cut."""
    layers = make_prompt_cache(model)
    if not layers or not all(type(layer) is KVCache for layer in layers):
        return None
    model(mx.array([[0]]), cache=layers)
    found: dict[tuple[mx.Dtype, int, int], list[int]] = {}
    for number, layer in enumerate(layers):
        for part, array in ((2 * number, layer.keys), (2 * number + 1, layer.values)):
            if array is None or array.ndim != _ROW_AXES or array.dtype.size not in _RAW:
                return None
            found.setdefault((array.dtype, array.shape[1], array.shape[3]), []).append(part)
    # One part alone would not be copied when it is cut.
    if any(len(parts) < 2 for parts in found.values()):
        return None
    return Layout([_Kind(*form, tuple(parts)) for form, parts in found.items()], len(layers))


def _numbers(arrays: list[mx.array]) -> list[list[int]]:
    mx.eval(arrays)
    return [array.tolist() for array in arrays]  # type: ignore[misc]
