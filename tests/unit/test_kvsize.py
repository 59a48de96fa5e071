"""What a sequence keeps, computed from config.json, against what mlx-lm really allocates for it."""

import importlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.kvsize import KvShape, kv_shape

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 100,
    "dtype": "float32",
}
MODELS: dict[str, dict[str, Any]] = {
    "grouped heads": LLAMA,
    "named layers with a window": {
        **LLAMA,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "a window by pattern": {
        **LLAMA,
        "model_type": "gemma3_text",
        "head_dim": 32,
        "num_hidden_layers": 6,
        "sliding_window": 64,
        "sliding_window_pattern": 3,
    },
    "linear attention and full attention": {
        **LLAMA,
        "model_type": "qwen3_next",
        "head_dim": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "num_experts": 0,
        "num_experts_per_tok": 1,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [],
        "moe_intermediate_size": 64,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 4096,
        "full_attention_interval": 2,
    },
    "mamba and attention": {
        **LLAMA,
        "model_type": "granitemoehybrid",
        "max_position_embeddings": 4096,
        "attention_bias": False,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "layer_types": ["mamba", "attention", "mamba", "mamba"],
        "rope_theta": 10000.0,
        "shared_intermediate_size": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_proj_bias": False,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
    },
    "only mamba": {
        "model_type": "mamba2",
        "num_heads": 4,
        "head_dim": 32,
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 128,
        "state_size": 16,
        "num_hidden_layers": 3,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
        "time_step_limit": [0.0, 10.0],
        "time_step_rank": 4,
        "dtype": "float32",
    },
    "compressed keys and values": {
        **LLAMA,
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "qk_nope_head_dim": 16,
        "n_routed_experts": None,
        "moe_intermediate_size": 64,
        "rope_scaling": None,
    },
    "both in each layer": {
        "model_type": "falcon_h1",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "mamba_d_conv": 4,
        "mamba_d_head": 16,
        "mamba_d_ssm": 128,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_n_heads": 8,
        "vocab_size": 100,
        "dtype": "float32",
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_what_mlx_lm_allocates(name: str) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.cache import make_prompt_cache

    config = MODELS[name]
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    cache = make_prompt_cache(model)
    tokens = 511  # plain caches grow in steps of 256
    model(mx.zeros((1, tokens), mx.int32), cache)
    model(mx.zeros((1, 1), mx.int32), cache)  # a rotating cache is cut to its window by the first step of decoding
    arrays = [part for _, part in tree_flatten([c.state for c in cache]) if isinstance(part, mx.array)]
    mx.eval(arrays)
    held = sum(array.nbytes for array in arrays)
    assert kv_shape(config).bytes_for(tokens + 1) == held


def test_a_published_model_has_its_known_size() -> None:
    """Llama 3.1 8B: 32 layers of 8 heads of 128, keys and values in 16 bits: 128 KiB a token."""
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "torch_dtype": "bfloat16",
        "sliding_window": 4096,
    }
    assert kv_shape(config) == KvShape(token_bytes=131_072)
    # 8 bits and 32 more for each 64 numbers.
    assert kv_shape(config, kv_bits=8) == KvShape(token_bytes=int(65_536 * 8.5 / 8))
    assert kv_shape({"text_config": config, "model_type": "llava"}) == KvShape(token_bytes=131_072)


def test_a_window_bounds_what_long_sequences_keep() -> None:
    shape = KvShape(token_bytes=10, windowed_bytes=100, window=50, state_bytes=7)
    assert shape.bytes_for(20) == 2_207
    assert shape.bytes_for(1_000) == 15_007
    assert shape.bytes_for(-1) == 7


NUMBERS = st.sampled_from([None, True, -1, 0, 1, 64, 2**70, 1.5, float("nan"), "full_attention", "x", [], [1, "M"], {}])
KEYS = sorted({key for config in MODELS.values() for key in config} | {"text_config", "linear_attn_config", "dtype"})


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(KEYS), NUMBERS, max_size=8), st.sampled_from([None, 4, 8]))
def test_no_configuration_raises_or_gives_less_than_nothing(config: dict[str, Any], bits: int | None) -> None:
    shape = kv_shape(config, kv_bits=bits)
    assert 0 <= shape.bytes_for(10) <= shape.bytes_for(1000)
