"""The tokenizer inside a GGUF, as the files that transformers reads.

Only byte-level BPE whose splitting rules are certain: with a wrong pre-tokenizer a model still talks, but worse,
and nothing would say so. That is why others are refused by name.
"""

import json
from pathlib import Path
from typing import Any, Final

from worker.gguf_file import GgufFile
from worker.tool_errors import ImportFailed

_CONTROL: Final = 3
_USER_DEFINED: Final = 4
_MAX_TOKENS: Final = 2_000_000
_BYTE_LEVEL: Final = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
#: `tokenizer.ggml.pre` to the pre-tokenizer of the original model's tokenizer.json.
_PRE_TOKENIZERS: Final[dict[str, dict[str, Any]]] = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
}
_SPECIAL_ROLES: Final = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


class GgufTokenizer:
    """The tokenizer of one file; raises `ImportFailed` if it is not one that can be carried over exactly."""

    def __init__(self, gguf: GgufFile) -> None:
        self._path = gguf.path
        self._metadata = gguf.metadata
        model = self._metadata.get("tokenizer.ggml.model")
        if model != "gpt2":
            msg = f"{self._path} has a tokenizer of the kind {model!r}; supported is gpt2 (byte-level BPE)"
            raise ImportFailed("unsupported", msg)
        pre = self._metadata.get("tokenizer.ggml.pre", "none")
        if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
            known = ", ".join(_PRE_TOKENIZERS)
            msg = f"{self._path} splits text by the rules {pre!r}; supported are {known}"
            raise ImportFailed("unsupported", msg)
        self._pre_tokenizer = _PRE_TOKENIZERS[pre]
        self._tokens = self._strings("tokens")
        self._ids = {token: number for number, token in enumerate(self._tokens)}
        if len(self._ids) != len(self._tokens):
            raise self._corrupt("has the same token twice")
        self._merges = [self._merge(line) for line in self._strings("merges")]
        self.special = {role: found for role, key in _SPECIAL_ROLES.items() if (found := self._special(key))}
        if "eos_token" not in self.special:
            raise self._corrupt("names no token that ends a text (tokenizer.ggml.eos_token_id)")

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def special_ids(self) -> dict[str, int]:
        """Return `bos_token_id` and the like, as config.json has them."""
        return {f"{role}_id": self._ids[token] for role, token in self.special.items() if role != "unk_token"}

    def write(self, folder: Path, max_tokens: int) -> None:
        """Write the tokenizer's files; `max_tokens` is the model's context."""
        template = self._metadata.get("tokenizer.chat_template")
        _write_json(folder / "tokenizer.json", self._tokenizer_json())
        _write_json(folder / "special_tokens_map.json", self.special)
        _write_json(
            folder / "tokenizer_config.json",
            {
                **self.special,
                # The class that takes tokenizer.json as it is; named ones rebuild parts of it their own way.
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                "model_max_length": max_tokens,
                **({"chat_template": template} if isinstance(template, str) and template else {}),
            },
        )

    def _tokenizer_json(self) -> dict[str, Any]:
        kinds = self._metadata.get("tokenizer.ggml.token_type", [])
        if not isinstance(kinds, list) or len(kinds) not in {0, len(self._tokens)}:
            raise self._corrupt("has a token_type list of the wrong length")
        special = set(self.special.values())
        added = [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind == _CONTROL or token in special,
            }
            for number, (token, kind) in enumerate(zip(self._tokens, kinds or [1] * len(self._tokens), strict=True))
            if kind in {_CONTROL, _USER_DEFINED} or token in special
        ]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": self._pre_tokenizer,
            "post_processor": self._post_processor(),
            "decoder": {**_BYTE_LEVEL, "add_prefix_space": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": self.special.get("unk_token"),
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": self._ids,
                "merges": self._merges,
            },
        }

    def _post_processor(self) -> dict[str, Any] | None:
        """Put the beginning-of-text token in front, if the file asks for it."""
        if not self._metadata.get("tokenizer.ggml.add_bos_token", False) or "bos_token" not in self.special:
            return None
        bos = self.special["bos_token"]
        first = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        return {
            "type": "TemplateProcessing",
            "single": first,
            "pair": [*first, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [self._ids[bos]], "tokens": [bos]}},
        }

    def _strings(self, key: str) -> list[str]:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list) or not 0 < len(value) <= _MAX_TOKENS:
            raise self._corrupt(f"has no usable tokenizer.ggml.{key}")
        strings = [item for item in value if isinstance(item, str)]
        if len(strings) != len(value):
            raise self._corrupt(f"has no usable tokenizer.ggml.{key}")
        return strings

    def _merge(self, line: str) -> tuple[str, str]:
        left, _, right = line.partition(" ")
        if left not in self._ids or right not in self._ids or left + right not in self._ids:
            raise self._corrupt(f"merges {line!r}, which its tokens do not allow")
        return left, right

    def _special(self, key: str) -> str | None:
        number = self._metadata.get(f"tokenizer.ggml.{key}")
        if number is None:
            return None
        if not isinstance(number, int) or not 0 <= number < len(self._tokens):
            raise self._corrupt(f"has {number!r} as tokenizer.ggml.{key}")
        return self._tokens[number]

    def _corrupt(self, what: str) -> ImportFailed:
        return ImportFailed("corrupt", f"{self._path} is corrupt: it {what}")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
