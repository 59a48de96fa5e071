"""How much cache is promised to the requests of a worker: projected before a prompt is processed. Pure policy.

The batch keeps the caches of all its sequences side by side, each as long as the longest (mlx-lm's `BatchKVCache`,
which grows in steps of 256 tokens). So one long request makes the others cost more, and what is promised is the number
of sequences times the bytes of the longest. Each of several answers to one prompt has a copy of its own.
"""

from typing import Final

import msgspec

from protocol.kvsize import KvShape

#: Tokens by which a cache grows.
STEP_TOKENS: Final = 256
#: Tokens of an answer that are promised when nobody said how long it may get; more are, as it grows.
OPEN_ENDED_TOKENS: Final = 1024


class Projection(msgspec.Struct, frozen=True):
    """Tokens of one sequence: of its prompt, and those it may generate. `open_ended`: nobody said how many."""

    prompt: int
    answer: int
    open_ended: bool = False

    @property
    def tokens(self) -> int:
        """What is promised at first."""
        return self.prompt + (min(self.answer, OPEN_ENDED_TOKENS) if self.open_ended else self.answer)


class Room:
    """Bytes of cache promised, by job. A budget of 0 promises everything."""

    def __init__(self, shape: KvShape, budget: int) -> None:
        self._shape = shape
        self.budget = budget
        self._tokens: dict[int, int] = {}

    @property
    def reserved(self) -> int:
        """Bytes that are promised now."""
        return self._bytes(len(self._tokens), max(self._tokens.values(), default=0))

    @property
    def most_tokens(self) -> int | None:
        """Tokens of the longest sequence that fits alone, in whole steps; None if there is no bound."""
        shape = self._shape
        if not self.budget or not (shape.token_bytes or shape.windowed_bytes or shape.state_bytes):
            return None
        if self._bytes(1, STEP_TOKENS) > self.budget:
            return 0
        if not shape.token_bytes and shape.bytes_for(shape.window) <= self.budget:
            return None
        left = self.budget - shape.state_bytes
        growing = (left - shape.windowed_bytes * shape.window) // shape.token_bytes if shape.token_bytes else 0
        if growing < shape.window:
            growing = left // (shape.token_bytes + shape.windowed_bytes)
        return growing // STEP_TOKENS * STEP_TOKENS

    def need(self, tokens: int) -> int:
        """Return the bytes of one sequence alone."""
        return self._bytes(1, tokens)

    def fits(self, tokens: int) -> bool:
        """Return whether a sequence may be promised its cache now."""
        if not self.budget:
            return True
        longest = max(self._tokens.values(), default=0)
        return self._bytes(len(self._tokens) + 1, max(longest, tokens)) <= self.budget

    def take(self, job: int, tokens: int) -> None:
        """Promise, or note that it has become longer than was thought."""
        self._tokens[job] = tokens

    def release(self, job: int) -> None:
        """Take the promise back; an unknown job is ignored."""
        self._tokens.pop(job, None)

    def _bytes(self, sequences: int, tokens: int) -> int:
        return sequences * self._shape.bytes_for(-(-tokens // STEP_TOKENS) * STEP_TOKENS)
