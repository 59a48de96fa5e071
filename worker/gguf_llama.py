"""Which llama a GGUF holds: hyper-parameters out of the metadata, and the name of every tensor on both sides."""

import math
from typing import Any, Final, Self

import msgspec

from worker.gguf_file import GgufFile
from worker.tool_errors import ImportFailed

SUPPORTED_ARCHITECTURES: Final = ("llama",)
#: Bounds of what is believed.
_MAX_LAYERS: Final = 1_000
_MAX_WIDTH: Final = 1_000_000
_MAX_CONTEXT: Final = 2**31 - 1


class MlxTensor(msgspec.Struct, frozen=True):
    """One tensor under both names; `heads` is set where the rows have to be un-permuted."""

    gguf_name: str
    mlx_name: str
    shape: tuple[int, ...]
    heads: int = 0


class LlamaShape(msgspec.Struct, frozen=True):
    """The hyper-parameters, checked against the tensors that are there."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context: int
    rms_norm_eps: float
    rope_theta: float
    tied: bool

    @classmethod
    def of(cls, gguf: GgufFile) -> Self:
        """Read them; raise `ImportFailed` for another architecture, a variant, or tensors that do not agree."""
        meta = _Metadata(gguf)
        architecture = gguf.metadata.get("general.architecture")
        if architecture not in SUPPORTED_ARCHITECTURES:
            known = ", ".join(SUPPORTED_ARCHITECTURES)
            msg = f"{gguf.path} is a model of the architecture {architecture!r}; supported is {known}"
            raise ImportFailed("unsupported", msg)
        _refuse_variants(gguf)
        heads = meta.integer("llama.attention.head_count", _MAX_WIDTH)
        hidden = meta.integer("llama.embedding_length", _MAX_WIDTH)
        embedding = gguf.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise meta.corrupt("has no usable tensor token_embd.weight")
        head_dim = meta.integer("llama.rope.dimension_count", _MAX_WIDTH, default=hidden // heads)
        if meta.integer("llama.attention.key_length", _MAX_WIDTH, default=head_dim) != head_dim or head_dim % 2:
            msg = f"{gguf.path} rotates only a part of each head, which is not supported"
            raise ImportFailed("unsupported", msg)
        shape = cls(
            layers=meta.integer("llama.block_count", _MAX_LAYERS),
            hidden=hidden,
            intermediate=meta.integer("llama.feed_forward_length", _MAX_WIDTH),
            heads=heads,
            kv_heads=meta.integer("llama.attention.head_count_kv", heads, default=heads),
            head_dim=head_dim,
            vocab_size=embedding.shape[0],
            context=meta.integer("llama.context_length", _MAX_CONTEXT),
            rms_norm_eps=meta.real("llama.attention.layer_norm_rms_epsilon"),
            rope_theta=meta.real("llama.rope.freq_base", default=10_000.0),
            tied="output.weight" not in gguf.tensors,
        )
        if heads % shape.kv_heads:
            raise meta.corrupt(f"shares {shape.kv_heads} KV heads between {heads} heads")
        shape._check_tensors(gguf, meta)
        return shape

    def config(self) -> dict[str, Any]:
        """Return config.json without the token ids."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context,
            "rope_theta": self.rope_theta,
            "rope_traditional": False,
            "tie_word_embeddings": self.tied,
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_act": "silu",
        }

    def tensors(self) -> list[MlxTensor]:
        """Return every tensor of such a model."""
        hidden, inner = self.hidden, self.intermediate
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        tensors = [MlxTensor("token_embd.weight", "model.embed_tokens.weight", (self.vocab_size, hidden))]
        for layer in range(self.layers):
            gguf, mlx = f"blk.{layer}.", f"model.layers.{layer}."
            tensors += [
                MlxTensor(f"{gguf}attn_norm.weight", f"{mlx}input_layernorm.weight", (hidden,)),
                MlxTensor(f"{gguf}attn_q.weight", f"{mlx}self_attn.q_proj.weight", (queries, hidden), self.heads),
                MlxTensor(f"{gguf}attn_k.weight", f"{mlx}self_attn.k_proj.weight", (keys, hidden), self.kv_heads),
                MlxTensor(f"{gguf}attn_v.weight", f"{mlx}self_attn.v_proj.weight", (keys, hidden)),
                MlxTensor(f"{gguf}attn_output.weight", f"{mlx}self_attn.o_proj.weight", (hidden, queries)),
                MlxTensor(f"{gguf}ffn_norm.weight", f"{mlx}post_attention_layernorm.weight", (hidden,)),
                MlxTensor(f"{gguf}ffn_gate.weight", f"{mlx}mlp.gate_proj.weight", (inner, hidden)),
                MlxTensor(f"{gguf}ffn_up.weight", f"{mlx}mlp.up_proj.weight", (inner, hidden)),
                MlxTensor(f"{gguf}ffn_down.weight", f"{mlx}mlp.down_proj.weight", (hidden, inner)),
            ]
        tensors.append(MlxTensor("output_norm.weight", "model.norm.weight", (hidden,)))
        if not self.tied:
            tensors.append(MlxTensor("output.weight", "lm_head.weight", (self.vocab_size, hidden)))
        return tensors

    def _check_tensors(self, gguf: GgufFile, meta: "_Metadata") -> None:
        wanted = {tensor.gguf_name: tensor.shape for tensor in self.tensors()}
        for name, shape in wanted.items():
            if name not in gguf.tensors:
                raise meta.corrupt(f"lacks the tensor {name!r}")
            found = gguf.tensors[name]
            if found.shape != shape:
                raise meta.corrupt(f"has {name!r} in the shape {found.shape} instead of {shape}")
            if len(shape) == 1 and found.type.block > 1:
                raise meta.corrupt(f"has the vector {name!r} quantized")
        unknown = sorted(set(gguf.tensors) - set(wanted))
        if unknown:
            msg = f"{gguf.path} has tensors that a plain llama has not ({', '.join(unknown[:3])})"
            raise ImportFailed("unsupported", msg)


def _refuse_variants(gguf: GgufFile) -> None:
    """Refuse by name what would load and then talk nonsense."""
    if gguf.metadata.get("llama.expert_count"):
        raise ImportFailed("unsupported", f"{gguf.path} is a mixture of experts, which is not supported")
    scaling = gguf.metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "llama.rope.scale_linear" in gguf.metadata or "rope_freqs.weight" in gguf.tensors:
        msg = f"{gguf.path} scales its rotary embedding (Llama 3.1 and later do), which is not supported"
        raise ImportFailed("unsupported", msg)
    if gguf.metadata.get("split.count", 1) != 1:
        msg = f"{gguf.path} is one part of several: join them with llama-gguf-split --merge first"
        raise ImportFailed("unsupported", msg)


class _Metadata:
    """Typed, bounded access."""

    def __init__(self, gguf: GgufFile) -> None:
        self._gguf = gguf

    def integer(self, key: str, maximum: int, default: int | None = None) -> int:
        """Return a number from 1 to `maximum`."""
        value = self._gguf.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
            raise self.corrupt(f"has {value!r:.50} as {key}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """Return a positive, finite number."""
        value = self._gguf.metadata.get(key, default)
        if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
            raise self.corrupt(f"has {value!r:.50} as {key}")
        return value

    def corrupt(self, what: str) -> ImportFailed:
        """Return the error to raise."""
        return ImportFailed("corrupt", f"{self._gguf.path} is corrupt: it {what}")
