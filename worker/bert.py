"""BERT and RoBERTa in MLX: tokens in, one vector or one score per sequence out. Main thread only.

Devlin et al. 2018, in the layout of the `transformers` checkpoints; post-norm, learned positions, exact GELU.
"""

from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any, Final

import mlx.core as mx
from mlx.nn.layers.activations import gelu, gelu_approx, relu
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.normalization import LayerNorm

from protocol.encoder import Activation, Encoder, EncoderShape

_ACTIVATIONS: Final[MappingProxyType[Activation, Callable[[mx.array], mx.array]]] = MappingProxyType(
    {
        "gelu": gelu,
        "gelu_new": gelu_approx,
        "gelu_pytorch_tanh": gelu_approx,
        "relu": relu,
    }
)
#: Parts of the names in a checkpoint -> ours; applied in this order.
_NAMES: Final = (
    ("encoder.layer.", "layers."),
    ("embeddings.word_embeddings.", "words."),
    ("embeddings.position_embeddings.", "positions."),
    ("embeddings.token_type_embeddings.", "types."),
    ("embeddings.LayerNorm.", "norm."),
    ("attention.self.", ""),
    ("attention.output.dense.", "attended."),
    ("attention.output.LayerNorm.", "attention_norm."),
    ("intermediate.dense.", "up."),
    ("output.dense.", "down."),
    ("output.LayerNorm.", "output_norm."),
    ("pooler.dense.", "head.dense."),
    ("classifier.dense.", "head.dense."),
    ("classifier.out_proj.", "head.score."),
    ("classifier.", "head.score."),
    (".gamma", ".weight"),
    (".beta", ".bias"),
)
_PREFIXES: Final = ("bert.", "roberta.")
#: A buffer that old versions of transformers saved.
_BUFFERS: Final = ("embeddings.position_ids", "embeddings.token_type_ids")


class _Layer(Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        size, eps = shape.hidden_size, shape.layer_norm_eps
        self.query, self.key, self.value, self.attended = (Linear(size, size) for _ in range(4))
        self.attention_norm = LayerNorm(size, eps=eps)
        self.up = Linear(size, shape.intermediate_size)
        self.down = Linear(shape.intermediate_size, size)
        self.output_norm = LayerNorm(size, eps=eps)
        self._heads = shape.num_attention_heads
        self._activation = _ACTIVATIONS[shape.hidden_act]

    def __call__(self, hidden: mx.array, mask: mx.array) -> mx.array:
        rows, length, size = hidden.shape

        def by_head(projection: Linear) -> mx.array:
            return projection(hidden).reshape(rows, length, self._heads, -1).transpose(0, 2, 1, 3)

        scale = (size // self._heads) ** -0.5
        attention = mx.fast.scaled_dot_product_attention(
            by_head(self.query), by_head(self.key), by_head(self.value), scale=scale, mask=mask
        )
        attention = attention.transpose(0, 2, 1, 3).reshape(rows, length, size)
        hidden = self.attention_norm(hidden + self.attended(attention))
        hidden = hidden + self.down(self._activation(self.up(hidden)))
        normed: mx.array = self.output_norm(hidden)
        return normed


class _Head(Module):
    """The score of a pair, from the first token."""

    def __init__(self, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dense = Linear(size, size)
        self.score = Linear(size, 1)

    def __call__(self, first: mx.array) -> mx.array:
        return mx.sigmoid(self.score(mx.tanh(self.dense(first))))


class Bert(Module):
    """One encoder with its pooling, and with a head if it scores pairs."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        shape = encoder.shape
        size = shape.hidden_size
        self.words = Embedding(shape.vocab_size, size)
        self.positions = Embedding(shape.max_position_embeddings, size)
        self.types = Embedding(shape.type_vocab_size, size)
        self.norm = LayerNorm(size, eps=shape.layer_norm_eps)
        self.layers = [_Layer(shape) for _ in range(shape.num_hidden_layers)]
        if encoder.scores_pairs:
            self.head = _Head(size)
        self._encoder = encoder

    def __call__(self, tokens: mx.array, lengths: mx.array, seconds: mx.array) -> mx.array:
        """Return (rows, hidden size), or (rows, 1) with a head; float32, not normalised.

        `tokens` is (rows, length), padded with any token. `lengths` (rows) says how many count, `seconds` (rows) from
        which one on they are of the second text.
        """
        places = mx.arange(tokens.shape[1])
        known = places < lengths[:, None]
        types = places >= seconds[:, None] if self._encoder.shape.type_vocab_size > 1 else mx.zeros_like(tokens)
        positions = self.positions(places + self._encoder.position_offset)
        hidden: mx.array = self.norm(self.words(tokens) + positions + self.types(types.astype(mx.int32)))
        mask = known[:, None, None, :]
        for layer in self.layers:
            hidden = layer(hidden, mask)
        if self._encoder.scores_pairs:
            scores: mx.array = self.head(hidden[:, 0])
            return scores.astype(mx.float32)
        if self._encoder.pooling == "cls":
            return hidden[:, 0].astype(mx.float32)
        hidden = hidden.astype(mx.float32) * known[:, :, None]
        return hidden.sum(axis=1) / lengths[:, None]


def rename(weights: Iterable[tuple[str, Any]], *, scores_pairs: bool) -> list[tuple[str, Any]]:
    """Return a checkpoint's weights under our names, without what is not used: buffers, and a pooler nobody asks."""
    renamed = []
    for given, array in weights:
        name = given
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        if name in _BUFFERS:
            continue
        for theirs, ours in _NAMES:
            name = name.replace(theirs, ours)
        if scores_pairs or not name.startswith("head."):
            renamed.append((name, array))
    return renamed
