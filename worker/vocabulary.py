"""A model's tokens: their ids, bytes and text. IO thread only.

`Words` is made of an `mlx_lm` TokenizerWrapper (or anything with the methods of a Hugging Face tokenizer).
"""

import json
from collections.abc import Callable
from typing import Any, Final

from protocol.data import Kind, Submit, TokenLogprob, TopLogprob
from protocol.errors import LmxError
from worker.detok import Decode
from worker.jobs import Scored

#: SentencePiece's sign for a space.
_SPACE: Final = "\u2581"
_BYTE_LEVEL: Final = "ByteLevel"


class Words:
    """`worker.jobs.Vocabulary`. Ids from 0 to below `size` are tokens of the model."""

    def __init__(self, tokenizer: Any, size: int, chat_tokens: Callable[[Submit], list[int]]) -> None:
        self.size = size
        self.decode = fast_decode(tokenizer)
        self._tokenizer = tokenizer
        self._chat_tokens = chat_tokens
        self._bos = getattr(tokenizer, "bos_token", None)
        self._pieces = {number: piece for piece, number in tokenizer.get_vocab().items()}
        self.longest = max((len(piece) for piece in self._pieces.values()), default=1)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._literal = {int(number): str(token) for number, token in added.items()}
        self._bytes_of = _find_spelling(tokenizer)
        #: Text and bytes of tokens asked for before; at most the whole vocabulary.
        self._spelled: dict[int, tuple[str, bytes]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, with the special tokens that the tokenizer puts around any.

        Not a second time, though, where the text itself begins with the first of them.
        """
        special = self._bos is None or not text.startswith(self._bos)
        return list(self._tokenizer.encode(text, add_special_tokens=special))

    def has(self, tokens: list[int]) -> bool:
        """Return whether these are tokens: what is past the end would be read from memory that is not ours."""
        return not tokens or (min(tokens) >= 0 and max(tokens) < self.size)

    def check(self, tokens: list[int], param: str) -> None:
        """Raise `LmxError` unless these are tokens."""
        if not self.has(tokens):
            msg = f"Token ids of this model are numbers from 0 to {self.size - 1}"
            raise LmxError("invalid_value", msg, param=param)

    def tokenize(self, submit: Submit) -> tuple[list[int], str]:
        """Answer `Kind.TOKENIZE` and `Kind.DETOKENIZE` with both sides; raise `LmxError`."""
        if submit.kind is Kind.TOKENIZE and submit.messages:
            tokens = self._chat_tokens(submit)
            return tokens, self.decode(tokens)
        match submit.kind, submit.inputs:
            case Kind.TOKENIZE, [str(text)]:
                return self.encode(text), text
            case Kind.DETOKENIZE, [list(tokens)]:
                self.check(tokens, "tokens")
                return tokens, self.decode(tokens)
        param = "prompt" if submit.kind is Kind.TOKENIZE else "tokens"
        raise LmxError("invalid_value", f"{param} must be given, once", param=param)

    def spell(self, scored: Scored) -> TokenLogprob:
        """Return a scored token in words; half a character is U+FFFD as text, and itself as bytes."""
        text, spelled = self._spell(scored.token)
        top = []
        for token, logprob in scored.top:
            other_text, other = self._spell(token)
            top.append(TopLogprob(other_text, logprob, other))
        return TokenLogprob(text, scored.logprob, spelled, top)

    def _spell(self, token: int) -> tuple[str, bytes]:
        known = self._spelled.get(token)
        if known is None:
            spelled = self.bytes_of(token)
            known = self._spelled[token] = (spelled.decode("utf-8", errors="replace"), spelled)
        return known

    def bytes_of(self, token: int) -> bytes:
        """Return what the token adds to a text; a special token is spelled out."""
        if token in self._literal:
            return self._literal[token].encode()
        piece = self._pieces.get(token)
        # A model may have more rows than its tokenizer has tokens.
        return b"" if piece is None else self._bytes_of(token, piece)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of tokens that are no text."""
    ids = set(getattr(tokenizer, "all_special_ids", ()))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids.update(int(number) for number, token in added.items() if getattr(token, "special", False))
    return frozenset(ids)


def fast_decode(tokenizer: Any) -> Decode:
    """Return the tokenizer's decoding without the layers of `transformers` around it, which cost 30 µs a call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda tokens: str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
    return lambda tokens: str(backend.decode(tokens, skip_special_tokens=False))


def byte_letters() -> dict[str, int]:
    """Return the byte that each letter stands for in the pieces of a byte-level tokenizer (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    return {chr(byte) if byte in printable else chr(next(spare)): byte for byte in range(256)}


def _find_spelling(tokenizer: Any) -> Callable[[int, str], bytes]:
    """Return how the pieces of this tokenizer stand for bytes: told by its decoder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    told = {} if decoder is None else json.loads(decoder.__getstate__())
    kinds = [part.get("type") for part in (told.get("decoders") or [told])]
    if _BYTE_LEVEL in kinds:
        letters = byte_letters()
        return lambda _, piece: bytes(letters[letter] for letter in piece if letter in letters)
    if {"ByteFallback", "Metaspace"} & set(kinds) or _SPACE in json.dumps(told, ensure_ascii=False):
        return lambda _, piece: _sentencepiece_bytes(piece)
    decode = fast_decode(tokenizer)
    return lambda token, _: decode([token]).encode()


def _sentencepiece_bytes(piece: str) -> bytes:
    if len(piece) == len("<0x00>") and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_SPACE, " ").encode()
