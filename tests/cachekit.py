"""Small models whose caches are of other kinds than plain keys and values."""

from typing import Any


def windowed() -> Any:
    """Return a model with sliding windows and full attention in turns; its weights are those of its making."""
    from mlx_lm.models import gemma3_text

    arguments = gemma3_text.ModelArgs(
        model_type="gemma3_text",
        hidden_size=32,
        num_hidden_layers=4,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=512,
        sliding_window=32,
        sliding_window_pattern=2,
    )
    return gemma3_text.Model(arguments)


def recurrent() -> Any:
    """Return a model with convolutions and full attention in turns."""
    from mlx_lm.models import lfm2

    arguments = lfm2.ModelArgs(
        model_type="lfm2",
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        norm_eps=1e-5,
        conv_bias=False,
        conv_L_cache=3,
        block_dim=32,
        block_multiple_of=8,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
        block_ff_dim=64,
        full_attn_idxs=[1, 3],
    )
    return lfm2.Model(arguments)
