"""Models for tests: a tiny random one made in a moment, and the real default model, fetched once per machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from protocol.builtin_models import DEFAULT_MODEL_ID
from protocol.modelfolder import ModelFolderError, inspect_model_folder

REPOSITORY = Path(__file__).resolve().parents[1]
END, START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END, START, TURN_END)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Every prefix of each becomes a token, with and without a space in front.
WORDS = """
the of and to in is that it was for on are as with his they at be this from have or by one had not but what all
were when we there can an your which their said if do will each about how up out them then she many some so these
would other into has more her two like him see time could no make than first been its who now people my made over
did down only way find use may water long little very after words called just where most know get through back
much before go good new write our used me man too any day same right look think also around another came come work
three word must because does part even place well such here take why things help put years different away again
off went old number great tell men say small every found still between name should home big give air line set own
under read last never us left end along while might next sound below saw something thought both few those always
looked show large often together asked house world going want school important until form food keep children feet
land side without boy once animals life enough took sometimes four head above kind began almost live page got
earth need far hand high year mother light parts country father let night following picture being study second
soon story since white ever paper hard near sentence better best across during today others however sure means
knew try told young miles sun ways thing whole hear example heard several change answer room sea against top
turned learn point city play toward five using himself usually user assistant system model token stream
""".split()  # noqa: SIM905


def make_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 64,
    vocab_size: int = 2_048,
    context: int = 8_192,
) -> Path:
    """Write a random llama in float32 with a real byte-level BPE tokenizer, and return its folder.

    The same arguments give the same bytes. Its text is words in random order without an end: special tokens and
    bytes that are no characters of their own have no chance at any temperature, so that a stream is exactly
    `max_tokens` long.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = _build_vocabulary(vocab_size)
    heads, head_dim = max(2, hidden // 16), 16
    kv_heads, inner = heads // 2, 2 * hidden
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(vocab),
        "max_position_embeddings": context,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "bos_token_id": vocab[START],
        "eos_token_id": vocab[TURN_END],
        "pad_token_id": vocab[END],
        "dtype": "float32",
    }
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", {"eos_token_id": vocab[TURN_END]})
    _write_tokenizer(folder, vocab, merges, context)
    weights = _random_weights(np.random.default_rng(seed), vocab, layers, hidden, inner, heads, kv_heads, head_dim)
    save_file(weights, folder / "model.safetensors", metadata={"format": "mlx"})
    return folder


def make_tiny_encoder(
    folder: Path,
    *,
    pairs: bool = False,
    cls: bool = False,
    model_type: str = "bert",
    hidden: int = 32,
    longest: int = 24,
) -> Path:
    """Write a random BERT in float32 with a word-level tokenizer, and return its folder; with `pairs` a reranker."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(WORDS)])}
    bert = model_type == "bert"
    positions = longest + (0 if bert else 2)
    family = "Bert" if bert else "Roberta"
    config: dict[str, object] = {
        "architectures": [f"{family}ForSequenceClassification" if pairs else f"{family}Model"],
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 2 * hidden,
        "vocab_size": len(vocab),
        "max_position_embeddings": positions,
        "type_vocab_size": 2 if bert else 1,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
    }
    if pairs:
        config["id2label"] = {"0": "LABEL_0"}
    _write(folder / "config.json", config)
    _write(folder / "tokenizer_config.json", {"model_max_length": 512, "tokenizer_class": "BertTokenizer"})
    special = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special.append({"SpecialToken": {"id": "[SEP]", "type_id": 0}})
    second = [{"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": "[SEP]", "type_id": 1}}]
    ids = {name: {"id": name, "ids": [vocab[name]], "tokens": [name]} for name in ("[CLS]", "[SEP]")}
    tokenizer = {
        "version": "1.0",
        # As in the files of sentence-transformers: neither must have an effect.
        "truncation": {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": {
            "strategy": {"Fixed": 8},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": special,
            "pair": [*special, *second],
            "special_tokens": ids,
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    }
    _write(folder / "tokenizer.json", tokenizer)
    if not pairs:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        _write(folder / "1_Pooling/config.json", {"pooling_mode_cls_token": cls, "pooling_mode_mean_tokens": not cls})
        modules = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")
        listed = [{"type": f"sentence_transformers.models.{name}", "path": path} for name, path in modules]
        (folder / "modules.json").write_text(json.dumps(listed))
    save_file(_encoder_weights(np.random.default_rng(1), config, pairs=pairs), folder / "model.safetensors")
    return folder


def _encoder_weights(
    random: np.random.Generator, config: dict[str, Any], *, pairs: bool
) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], hidden),
        "embeddings.LayerNorm.": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}."
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= {f"{at}attention.{name}.weight": (hidden, hidden), f"{at}attention.{name}.bias": (hidden,)}
        shapes |= {
            f"{at}intermediate.dense.weight": (inner, hidden),
            f"{at}intermediate.dense.bias": (inner,),
            f"{at}output.dense.weight": (hidden, inner),
            f"{at}output.dense.bias": (hidden,),
            f"{at}attention.output.LayerNorm.": (hidden,),
            f"{at}output.LayerNorm.": (hidden,),
        }
    bert = config["model_type"] == "bert"
    if bert:
        shapes |= {"pooler.dense.weight": (hidden, hidden), "pooler.dense.bias": (hidden,)}
    prefix = ("bert." if bert else "roberta.") if pairs else ""
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("LayerNorm."):
            weights[f"{prefix}{name}weight"] = 1 + 0.2 * random.standard_normal(shape)
            weights[f"{prefix}{name}bias"] = 0.2 * random.standard_normal(shape)
        else:
            weights[prefix + name] = random.standard_normal(shape) * (2 / shape[-1] ** 0.5 if len(shape) > 1 else 0.2)
    if pairs and bert:
        weights |= {"classifier.weight": random.standard_normal((1, hidden)), "classifier.bias": np.zeros(1)}
    elif pairs:
        weights |= {
            "classifier.dense.weight": random.standard_normal((hidden, hidden)) / hidden**0.5,
            "classifier.dense.bias": np.zeros(hidden),
            "classifier.out_proj.weight": random.standard_normal((1, hidden)),
            "classifier.out_proj.bias": np.zeros(1),
        }
    return {name: array.astype(np.float32) for name, array in weights.items()}


def default_model(cache_dir: Path | None = None) -> Path:
    """Return the folder of the default model, fetched at most once per machine however many ask at once."""
    return builtin_model(DEFAULT_MODEL_ID, cache_dir)


def builtin_model(model: str, cache_dir: Path | None = None) -> Path:
    """Return the folder of a built-in model, fetched at most once per machine however many ask at once."""
    models = (cache_dir or cache_folder()) / "models"
    folder = models / model
    try:
        return inspect_model_folder(folder).path
    except ModelFolderError:
        pass  # fetch says what is wrong with it, if it is there
    command = [sys.executable, "-m", "worker.tools", "fetch", model, "--models-dir", str(models)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1_800, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def cache_folder() -> Path:
    """Return `$LMX_TEST_CACHE`, or `~/.cache/lmx-tests`."""
    return Path(os.environ.get("LMX_TEST_CACHE") or Path.home() / ".cache" / "lmx-tests")


def byte_alphabet() -> list[str]:
    """Return the characters that stand for the 256 bytes in byte-level BPE (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _build_vocabulary(limit: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokens = dict.fromkeys(byte_alphabet())
    merges: list[tuple[str, str]] = []
    for prefix in ("Ġ", ""):  # Ġ is the space
        for word in WORDS:
            piece, *rest = prefix + word
            for letter in rest:
                if piece + letter not in tokens and len(tokens) < limit - len(SPECIAL_TOKENS):
                    tokens[piece + letter] = None
                    merges.append((piece, letter))
                elif piece + letter not in tokens:
                    break
                piece += letter
    return {token: number for number, token in enumerate([*tokens, *SPECIAL_TOKENS])}, merges


def _write_tokenizer(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]], context: int) -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[token], "content": token, **flags} for token in SPECIAL_TOKENS],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    special = {"bos_token": START, "eos_token": TURN_END, "pad_token": END, "unk_token": END}
    _write(folder / "tokenizer.json", tokenizer)
    _write(folder / "special_tokens_map.json", special)
    more = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "chat_template": CHATML,
    }
    _write(folder / "tokenizer_config.json", special | more)


def _random_weights(
    random: np.random.Generator,
    vocab: dict[str, int],
    layers: int,
    hidden: int,
    inner: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Return weights of which one channel is a constant, so that the last matrix has a bias.

    Channel 0 of each embedding is 1 and no layer writes to it; `lm_head[token, 0]` is then added to that token's
    logit, times something positive: far below zero for what must not be said.
    """

    def matrix(rows: int, columns: int, scale: float) -> np.ndarray[Any, np.dtype[np.float32]]:
        return (random.standard_normal((rows, columns)) * scale / columns**0.5).astype(np.float32)

    def ones() -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.ones(hidden, dtype=np.float32)

    weights = {"model.embed_tokens.weight": matrix(len(vocab), hidden, hidden**0.5), "model.norm.weight": ones()}
    weights["model.embed_tokens.weight"][:, 0] = 1
    for layer in range(layers):
        name = f"model.layers.{layer}."
        weights |= {
            f"{name}input_layernorm.weight": ones(),
            f"{name}post_attention_layernorm.weight": ones(),
            f"{name}self_attn.q_proj.weight": matrix(heads * head_dim, hidden, 1.5),
            f"{name}self_attn.k_proj.weight": matrix(kv_heads * head_dim, hidden, 1.5),
            f"{name}self_attn.v_proj.weight": matrix(kv_heads * head_dim, hidden, 1.5),
            f"{name}self_attn.o_proj.weight": matrix(hidden, heads * head_dim, 2.0),
            f"{name}mlp.gate_proj.weight": matrix(inner, hidden, 1.5),
            f"{name}mlp.up_proj.weight": matrix(inner, hidden, 1.5),
            f"{name}mlp.down_proj.weight": matrix(hidden, inner, 2.0),
        }
        weights[f"{name}self_attn.o_proj.weight"][0] = 0
        weights[f"{name}mlp.down_proj.weight"][0] = 0
    head = matrix(len(vocab), hidden, 3.0)
    head[:, 0] = [0.0 if _is_speakable(token) else -1_000.0 for token in vocab]
    weights["lm_head.weight"] = head
    return weights


def _is_speakable(token: str) -> bool:
    return token not in SPECIAL_TOKENS and all("!" <= letter <= "~" or letter == "Ġ" for letter in token)


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
