"""What one sequence keeps in memory, from `config.json` alone: keys and values, sliding windows, recurrent states.

It follows what mlx-lm 0.32 allocates (its `make_cache` functions and `models/cache.py`): a plain cache holds every
token, a rotating one the last `sliding_window`, a Mamba or linear-attention layer a state of constant size. A model
that says less than is needed counts as plain attention in every layer, which is never too little.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

#: Bytes of one element; quantised models compute in 16 bits.
_DTYPE_BYTES: Final[Mapping[str, int]] = {"float32": 4, "float16": 2, "bfloat16": 2}
#: A quantised cache has a scale and a bias of 16 bits for each group.
_SCALE_BITS: Final = 32
#: What is kept of each token is one compressed row for all heads, instead of keys and values (mlx-lm's classes).
_LATENT: Final = frozenset({"deepseek_v3", "deepseek_v32", "glm4_moe_lite", "kimi_k2", "kimi_linear", "longcat_flash"})
_FULL: Final = frozenset({"full_attention", "attention", "global", "global_attention", "*"})
_WINDOWED: Final = frozenset({"sliding_attention", "local_attention", "chunked_attention"})
_RECURRENT: Final = frozenset({"mamba", "mamba2", "linear_attention", "recurrent", "conv", "M"})
#: Layers that keep nothing: the feed-forward ones of Nemotron-H.
_EMPTY: Final = frozenset({"mlp", "moe", "-", "E"})
#: Models whose every layer is recurrent, and those with both in each layer.
_ONLY_RECURRENT: Final = frozenset({"mamba", "mamba2", "falcon_mamba", "rwkv7"})
_BOTH: Final = frozenset({"falcon_h1"})
#: The class's own pattern where the config names none: one full layer in so many.
_PATTERNS: Final[Mapping[str, int]] = {"gemma3_text": 6, "gemma3": 6, "cohere2": 4, "exaone4": 4, "olmo3": 4}
_MAX_LAYERS: Final = 10_000
_MAX_NUMBER: Final = 2**40
_F32: Final = 4


class KvShape(msgspec.Struct, frozen=True):
    """Bytes that one sequence takes.

    `token_bytes` for each token, `windowed_bytes` for each of the last `window` tokens, `state_bytes` whatever its
    length.
    """

    token_bytes: int = 0
    windowed_bytes: int = 0
    window: int = 0
    state_bytes: int = 0

    def bytes_for(self, tokens: int) -> int:
        """Return the bytes of one sequence of so many tokens."""
        tokens = max(0, tokens)
        return self.token_bytes * tokens + self.windowed_bytes * min(tokens, self.window) + self.state_bytes


def kv_shape(config: Mapping[str, Any], *, kv_bits: int | None = None, group_size: int = 64) -> KvShape:
    """Return the shape for a model's `config.json`; never raises. `kv_bits` is None for a plain cache.

    Only full attention is quantised: mlx-lm has no quantised rotating cache.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):  # multimodal: the language model's part, with what only the whole says
        config = {**config, **text, "model_type": text.get("model_type") or config.get("model_type")}
    layers = _layers(config)
    width = _dtype_bytes(config)
    row = _row(config)
    full = sum(kind in {"full", "both"} for kind in layers)
    windowed = layers.count("windowed")
    recurrent = sum(kind in {"recurrent", "both"} for kind in layers)
    bits = width * 8 if kv_bits is None else kv_bits + _SCALE_BITS / max(1, group_size)
    return KvShape(
        token_bytes=int(full * row * bits) // 8,
        windowed_bytes=windowed * row * width,
        window=_window(config) if windowed else 0,
        state_bytes=recurrent * _state(config, width) if recurrent else 0,
    )


# -- layers -----------------------------------------------------------------------------------------------------


def _layers(config: Mapping[str, Any]) -> list[str]:
    """Return what each layer keeps: full, windowed, recurrent, both or nothing."""
    kind = _type(config)
    count = min(_number(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers"), _MAX_LAYERS)
    if kind in _ONLY_RECURRENT:
        return ["recurrent"] * count
    if kind in _BOTH:
        return ["both"] * count
    named = _named(config)
    if named:
        shared = _number(config, "num_kv_shared_layers")  # gemma3n: the last layers use the caches of earlier ones
        layers = [_kind(name) for name in named[: max(0, len(named) - shared)]]
    else:
        layers = [_by_period(config, number) for number in range(count)]
    if not _window(config):
        layers = ["full" if layer == "windowed" else layer for layer in layers]
    return layers * 2 if kind == "longcat_flash" else layers  # two attentions in each layer


def _named(config: Mapping[str, Any]) -> list[Any]:
    for key in ("layer_types", "layers_block_type", "hybrid_override_pattern", "block_types"):
        value = config.get(key)
        if isinstance(value, str | list) and value:
            return list(value)[:_MAX_LAYERS]
    chosen = config.get("full_attn_idxs")
    if isinstance(chosen, list):
        count = min(_number(config, "num_hidden_layers"), _MAX_LAYERS)
        return ["full_attention" if number in chosen else "conv" for number in range(count)]
    return []


def _kind(name: Any) -> str:
    for words, kind in ((_WINDOWED, "windowed"), (_RECURRENT, "recurrent"), (_EMPTY, "nothing")):
        if isinstance(name, str) and name in words:
            return kind
    return "full"


def _by_period(config: Mapping[str, Any], layer: int) -> str:
    kind = _type(config)
    interval = _number(config, "full_attention_interval") or (4 if kind == "qwen3_next" else 0)
    if interval:
        return "full" if (layer + 1) % interval == 0 else "recurrent"
    period = _number(config, "attn_layer_period")
    if period:
        return "full" if layer % period == _number(config, "attn_layer_offset") else "recurrent"
    linear = config.get("linear_attn_config")
    if isinstance(linear, Mapping) and isinstance(linear.get("kda_layers"), list):  # kimi_linear: counted from 1
        return "recurrent" if layer + 1 in linear["kda_layers"] else "full"
    # `sliding_window` alone says nothing: mlx-lm gives Mistral and Qwen2, which have it, plain caches.
    pattern = _number(config, "sliding_window_pattern") or _PATTERNS.get(kind, 0)
    if pattern:
        return "full" if (layer + 1) % pattern == 0 else "windowed"
    return "full"


def _window(config: Mapping[str, Any]) -> int:
    given = _number(config, "sliding_window", "sliding_window_size", "attention_window_size")
    return given or (512 if _type(config) in {"gemma3_text", "gemma3"} else 0)


# -- sizes ------------------------------------------------------------------------------------------------------


def _row(config: Mapping[str, Any]) -> int:
    """Return the numbers that one attention layer keeps of one token."""
    rank = _number(config, "kv_lora_rank")
    if rank:
        rotary = _number(config, "qk_rope_head_dim")
        if _type(config) in _LATENT:
            # DeepSeek 3.2's indexer keeps its key twice.
            return rank + rotary + 2 * _number(config, "index_head_dim")
        heads = _number(config, "num_attention_heads")
        return heads * (_number(config, "qk_nope_head_dim") + rotary + _number(config, "v_head_dim"))
    heads = _number(config, "num_attention_heads", "n_head", "n_heads", "num_heads")
    kv_heads = _number(config, "num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num") or heads
    hidden = _number(config, "hidden_size", "n_embd", "d_model", "dim")
    head = _number(config, "head_dim", "attention_head_dim", "kv_channels")
    if not head:
        head = 256 if _type(config) in {"gemma3_text", "gemma3"} else hidden // max(1, heads)
    return kv_heads * (head + (_number(config, "v_head_dim") or head))


def _state(config: Mapping[str, Any], width: int) -> int:
    """Return the bytes of one recurrent layer's state: the end of the convolution's input, and the state proper."""
    hidden = _number(config, "hidden_size", "d_model")
    kernel = _number(config, "linear_conv_kernel_dim", "mamba_d_conv", "conv_kernel", "conv_L_cache", "d_conv") or 4
    if _number(config, "linear_num_value_heads"):  # gated delta net
        values = _number(config, "linear_num_value_heads") * _number(config, "linear_value_head_dim")
        keys = _number(config, "linear_num_key_heads") * _number(config, "linear_key_head_dim")
        state = values * _number(config, "linear_key_head_dim")
        return (kernel - 1) * (2 * keys + values) * width + state * _F32
    if _number(config, "conv_L_cache"):  # LFM2: a short convolution only
        return (kernel - 1) * hidden * width
    states = _number(config, "mamba_d_state", "ssm_state_size", "state_size", "d_state")
    heads = _number(config, "mamba_n_heads", "mamba_num_heads")
    head = _number(config, "mamba_d_head", "mamba_head_dim")
    if _type(config) == "mamba2":
        heads, head = _number(config, "num_heads"), _number(config, "head_dim")
    if heads and head and states:  # Mamba 2
        groups = _number(config, "mamba_n_groups", "n_groups") or 1
        return (kernel - 1) * (heads * head + 2 * groups * states) * width + heads * head * states * _F32
    if states:  # Mamba 1
        inner = (_number(config, "mamba_expand", "expand") or 2) * hidden
        inner = _number(config, "intermediate_size") if _type(config) == "mamba" else inner
        return (kernel - 1) * inner * width + inner * states * _F32
    linear = config.get("linear_attn_config")
    part: Mapping[str, Any] = linear if isinstance(linear, Mapping) else config
    heads = _number(part, "num_heads", "num_attention_heads") or max(1, hidden // 64)
    head = _number(part, "head_dim") or hidden // heads
    return heads * head * head * _F32 + 3 * (kernel - 1) * heads * head * width


def _dtype_bytes(config: Mapping[str, Any]) -> int:
    names: Iterable[Any] = (config.get("dtype"), config.get("torch_dtype"))
    return next((_DTYPE_BYTES[name] for name in names if isinstance(name, str) and name in _DTYPE_BYTES), 2)


def _type(config: Mapping[str, Any]) -> str:
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else ""


def _number(config: Mapping[str, Any], *keys: str) -> int:
    """Return the first of these that is a natural number, 0 if none is."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MAX_NUMBER:
            return value
    return 0
