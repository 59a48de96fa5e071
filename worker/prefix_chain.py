"""Names for the beginnings of prompts: a chain of hashes over blocks of tokens. Pure.

A block's name stands for its tokens and for all that came before them, for the model, and for whom the prefix is kept
apart from. So equal names are equal prefixes, and the names alone, on a disk say, tell nobody what was asked.
"""

import hashlib
from array import array
from collections.abc import Sequence
from typing import Final

#: Tokens of a block. A hit is a whole number of them: smaller ones waste less, larger ones are fewer files and copies.
BLOCK_TOKENS: Final = 64
#: Collisions are out of reach: two prefixes with one name would be another's answer.
NAME_BYTES: Final = 24
_KIND: Final = b"lmx.prefix/1"


def root_name(model: bytes, salt: str = "") -> bytes:
    """Return what the chains of one model begin with. Different salts have no prefix in common."""
    return _hash(_KIND + len(model).to_bytes(4, "little") + model + salt.encode("utf-8", "surrogatepass"))


class Chain:
    """The names of the full blocks of one growing sequence of tokens, first block first."""

    def __init__(self, root: bytes) -> None:
        self._last = root
        self.names: list[bytes] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Name every full block of `tokens`, the whole sequence so far, that has no name yet."""
        for begin in range(len(self.names) * BLOCK_TOKENS, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            block = array("I", tokens[begin : begin + BLOCK_TOKENS])
            self._last = _hash(self._last + block.tobytes())
            self.names.append(self._last)


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=NAME_BYTES).digest()
