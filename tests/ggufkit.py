"""A GGUF writer for tests: the inverse of what the importer reads, written from the format's description."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

ALIGNMENT = 32
TYPE_NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9

#: (type name, shape with rows first, the bytes)
Tensor = tuple[str, tuple[int, ...], bytes]


def gguf_bytes(metadata: dict[str, Any], tensors: dict[str, Tensor], *, version: int = 3) -> bytes:
    """Return a whole file."""
    out = bytearray(b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += _string(key) + _value(value)
    offset = 0
    for name, (kind, shape, data) in tensors.items():
        out += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        out += struct.pack("<IQ", TYPE_NUMBERS.get(kind, 12), offset)
        offset += -(-len(data) // ALIGNMENT) * ALIGNMENT
    for _kind, _shape, data in tensors.values():
        out += b"\0" * (-len(out) % ALIGNMENT) + data
    return bytes(out)


def llama_gguf(
    folder: Path, encode: Callable[[str, np.ndarray], tuple[str, bytes]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata and tensors that llama.cpp's converter makes of a llama in a model folder.

    `encode` is given (GGUF name, float32 array) and returns (type name, bytes).
    """
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = list(tokenizer["model"]["vocab"])
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": config["num_hidden_layers"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "llama.rope.freq_base": float(config["rope_theta"]),
        "llama.rope.dimension_count": config["head_dim"],
        "llama.context_length": config["max_position_embeddings"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.chat_template": json.loads((folder / "tokenizer_config.json").read_text())["chat_template"],
    }
    tensors: dict[str, Tensor] = {}
    for mlx_name, array in load_file(folder / "model.safetensors").items():
        name = _gguf_name(mlx_name)
        if ".attn_q." in name:
            array = permute(array, config["num_attention_heads"])  # noqa: PLW2901
        elif ".attn_k." in name:
            array = permute(array, config["num_key_value_heads"])  # noqa: PLW2901
        kind, data = encode(name, array)
        tensors[name] = (kind, array.shape, data)
    return metadata, tensors


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Order rows as llama.cpp wants them (convert_hf_to_gguf.py, LlamaModel.permute)."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def encode_float(kind: str, array: np.ndarray) -> bytes:
    """Return F32, F16 or (cut, not rounded) BF16."""
    if kind == "BF16":
        return (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return array.astype({"F32": "<f4", "F16": "<f2"}[kind]).tobytes()


def encode_quantized(kind: str, array: np.ndarray) -> bytes:
    """Quantize as ggml lays it out; the rounding is ours."""
    groups = array.astype(np.float32).reshape(-1, 32)
    if kind == "Q8_0":
        scale = _half(np.abs(groups).max(axis=1, keepdims=True) / 127)
        quants = np.clip(np.rint(groups / scale), -127, 127).astype(np.int8).view(np.uint8)
        return np.concatenate([_bytes(scale), quants], axis=1).tobytes()
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    if kind == "Q4_1":
        scale, start = _half((high - low) / 15), _half(low)
        head = np.concatenate([_bytes(scale), _bytes(start)], axis=1)
    else:
        scale = _half(np.maximum(np.abs(low), np.abs(high)) / 7)
        start, head = -8 * scale, _bytes(scale)
    quants = np.clip(np.rint((groups - start) / scale), 0, 15).astype(np.uint8)
    return np.concatenate([head, quants[:, :16] | (quants[:, 16:] << 4)], axis=1).tobytes()


def decode_quantized(kind: str, data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Return what ggml's reference (dequantize_row_*) computes, in float32."""
    size = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[kind]
    blocks = np.frombuffer(data, np.uint8).reshape(-1, size)
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    if kind == "Q8_0":
        return (blocks[:, 2:].view(np.int8).astype(np.float32) * scale).reshape(shape)
    quants = blocks[:, -16:]
    values = np.concatenate([quants & 15, quants >> 4], axis=1).astype(np.float32)
    if kind == "Q4_0":
        return ((values - 8) * scale).reshape(shape)
    return (values * scale + np.ascontiguousarray(blocks[:, 2:4]).view("<f2").astype(np.float32)).reshape(shape)


def _half(array: np.ndarray) -> np.ndarray:
    half = array.astype(np.float16).astype(np.float32)
    return np.where(half == 0, np.float32(2**-14), half)


def _bytes(scale: np.ndarray) -> np.ndarray:
    return scale.astype("<f2").view(np.uint8)


def _gguf_name(name: str) -> str:
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    _model, _layers, number, rest = name.split(".", 3)
    return f"blk.{number}.{parts[rest.removesuffix('.weight')]}.weight"


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    match value:
        case bytes():  # written as it is, for values that no writer would write
            return value
        case bool():
            return struct.pack("<I?", BOOL, value)
        case int():
            return struct.pack("<II", UINT32, value)
        case float():
            return struct.pack("<If", FLOAT32, value)
        case str():
            return struct.pack("<I", STRING) + _string(value)
        case [str(), *_]:
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
        case list():
            return struct.pack(f"<IIQ{len(value)}i", ARRAY, INT32, len(value), *value)
    msg = f"no type for {value!r}"
    raise TypeError(msg)
