"""BERT again, in numpy and float64, without batches or padding: what the worker's vectors are compared with."""

import json
from math import erf
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

Array = np.ndarray[Any, np.dtype[np.float64]]


class Reference:
    """One model folder; `vector` and `score` take one input at a time."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        loaded = load_file(folder / "model.safetensors").items()
        self._weights = {k.removeprefix("bert.").removeprefix("roberta."): v.astype(np.float64) for k, v in loaded}
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        pooling = folder / "1_Pooling/config.json"
        self._cls = pooling.exists() and json.loads(pooling.read_text())["pooling_mode_cls_token"]

    def vector(self, text: str | list[int]) -> Array:
        tokens = self.tokenizer.encode(text).ids if isinstance(text, str) else text
        hidden = self._hidden(tokens, [0] * len(tokens))
        pooled: Array = hidden[0] if self._cls else hidden.mean(axis=0)
        return pooled / np.linalg.norm(pooled)

    def score(self, query: str, document: str) -> float:
        encoding = self.tokenizer.encode(query, document)
        first = self._hidden(encoding.ids, encoding.type_ids)[0]
        bert = "classifier.weight" in self._weights
        dense = self._linear("pooler.dense" if bert else "classifier.dense", first)
        (logit,) = self._linear("classifier" if bert else "classifier.out_proj", np.tanh(dense))
        return float(1 / (1 + np.exp(-logit)))

    def _hidden(self, tokens: list[int], types: list[int]) -> Array:
        weights = self._weights
        first = 0 if self.config["model_type"] == "bert" else 2
        places = np.arange(len(tokens)) + first
        kinds = np.array(types) * (self.config["type_vocab_size"] > 1)
        hidden = weights["embeddings.word_embeddings.weight"][tokens]
        hidden = hidden + weights["embeddings.position_embeddings.weight"][places]
        hidden = self._norm("embeddings.LayerNorm", hidden + weights["embeddings.token_type_embeddings.weight"][kinds])
        for layer in range(self.config["num_hidden_layers"]):
            at = f"encoder.layer.{layer}."
            attended = self._linear(at + "attention.output.dense", self._attend(at + "attention.self.", hidden))
            hidden = self._norm(at + "attention.output.LayerNorm", hidden + attended)
            up = self._linear(at + "intermediate.dense", hidden)
            up = up * 0.5 * (1 + np.vectorize(erf)(up / 2**0.5))
            hidden = self._norm(at + "output.LayerNorm", hidden + self._linear(at + "output.dense", up))
        return hidden

    def _attend(self, at: str, hidden: Array) -> Array:
        heads = self.config["num_attention_heads"]
        query, key, value = (
            self._linear(at + name, hidden).reshape(len(hidden), heads, -1).swapaxes(0, 1)
            for name in ("query", "key", "value")
        )
        scores = query @ key.swapaxes(1, 2) / query.shape[-1] ** 0.5
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        attended: Array = (scores @ value).swapaxes(0, 1).reshape(hidden.shape)
        return attended

    def _linear(self, name: str, x: Array) -> Array:
        made: Array = x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]
        return made

    def _norm(self, name: str, x: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self.config["layer_norm_eps"])
        normed: Array = scaled * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]
        return normed
