"""Which sequences of which requests an encoder takes next, and which of them go through it together. Pure policy.

A step has a budget in tokens, so that nobody waits long for anybody: requests take turns, one sequence each, until it
is spent. What was taken is then sorted into buckets of similar length, because a bucket is padded to its longest.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

#: A sequence joins a bucket if it is at least so long in relation to its longest: bounds what padding can waste.
_LEAST_SHARE: Final = 0.75


class Piece(NamedTuple):
    """One sequence: whose it is, which of its, and how many tokens it has."""

    job: int
    number: int
    length: int


class Turns:
    """The sequences of all requests that are still to be encoded."""

    def __init__(self) -> None:
        self._waiting: dict[int, deque[Piece]] = {}
        self._turns: deque[int] = deque()

    def add(self, job: int, lengths: Sequence[int]) -> None:
        """Line up a request's sequences, the longest first: neighbours then fit into one bucket."""
        pieces = [Piece(job, number, length) for number, length in enumerate(lengths)]
        self._waiting[job] = deque(sorted(pieces, key=lambda piece: -piece.length))
        self._turns.append(job)

    def drop(self, job: int) -> None:
        """Forget a request; an unknown one is ignored."""
        if self._waiting.pop(job, None) is not None:
            self._turns.remove(job)

    def take(self, budget: int) -> list[Piece]:
        """Return the next sequences, at least one if there is any, with together at most `budget` tokens.

        The turn moves on with each, also from one call to the next.
        """
        taken: list[Piece] = []
        while self._turns:
            job = self._turns[0]
            pieces = self._waiting[job]
            if taken and pieces[0].length > budget:
                break
            piece = pieces.popleft()
            taken.append(piece)
            budget -= piece.length
            self._turns.popleft()
            if pieces:
                self._turns.append(job)
            else:
                del self._waiting[job]
        return taken


def buckets(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Split into groups of similar length, the longest of each in front."""
    bucket: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: -piece.length):
        if bucket and piece.length < bucket[0].length * _LEAST_SHARE:
            yield bucket
            bucket = []
        bucket.append(piece)
    if bucket:
        yield bucket
