"""What the model itself thought of the tokens chosen, for the requests that ask. Main thread only.

"Itself": of the logits as the model made them, before penalties, bias, constraint and temperature.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx

from worker.jobs import Scored


class Scores:
    """The scores of some rows, made with the step that chose their tokens, and read in the next one.

    By then they are there; asking for them earlier, or making them later, would wait for the step in between.
    """

    def __init__(self, logits: Any, tokens: Any, top: int) -> None:
        """Build them: `logits` (rows, vocabulary), `tokens` (rows,) chosen, the `top` likeliest besides."""
        logits = logits.astype(mx.float32)
        total = mx.logsumexp(logits, axis=-1, keepdims=True)
        self._tokens = tokens
        self._chosen = (mx.take_along_axis(logits, tokens[:, None], axis=-1) - total)[:, 0]
        self._top_tokens: Any = None
        self._top: Any = None
        top = min(top, logits.shape[-1])
        if top > 0:
            self._top_tokens = mx.argpartition(logits, -top, axis=-1)[:, -top:]
            self._top = mx.take_along_axis(logits, self._top_tokens, axis=-1) - total
        self._read: tuple[list[int], list[float], list[list[int]], list[list[float]]] | None = None

    @property
    def arrays(self) -> list[Any]:
        """What has to be evaluated."""
        arrays = [self._tokens, self._chosen]
        return arrays if self._top is None else [*arrays, self._top_tokens, self._top]

    def read(self, row: int, top: int) -> Scored:
        """Return what is known of one row, with the `top` likeliest in order."""
        if self._read is None:
            none: list[Any] = [[]] * len(self._tokens)
            tops = (none, none) if self._top is None else (self._top_tokens.tolist(), self._top.tolist())
            self._read = (self._tokens.tolist(), self._chosen.tolist(), *tops)
        tokens, chosen, top_tokens, tops_ = self._read
        likeliest = sorted(zip(top_tokens[row], tops_[row], strict=True), key=lambda pair: (-pair[1], pair[0]))
        return Scored(tokens[row], chosen[row], likeliest[:top])


class Record:
    """One row of `Scores`."""

    __slots__ = ("_row", "_top", "scores")

    def __init__(self, scores: Scores, row: int, top: int) -> None:
        self.scores = scores
        self._row = row
        self._top = top

    def read(self) -> Scored:
        """Return what is known."""
        return self.scores.read(self._row, self._top)


class Recorder:
    """A logits processor that changes nothing: it stands first in its row and says that the row is to be scored.

    `worker.lean` only looks at it. Called by mlx-lm itself, it scores each token when it comes back as the last one.
    """

    def __init__(self, top: int) -> None:
        self.top = top
        self._before: Any = None
        self._record: Record | None = None

    def __call__(self, tokens: Any, logits: Any) -> Any:
        """Score the last token with the logits of the call before."""
        if self._before is not None:
            self._record = Record(Scores(self._before, tokens[-1:], self.top), 0, self.top)
        self._before = logits
        return logits

    def read(self) -> Scored:
        """Return the score of the token that came last."""
        assert self._record is not None
        return self._record.read()


def record(logits: Any, tokens: Any, wanted: Sequence[tuple[int, int]]) -> list[Record | None]:
    """Return a record for each row, None for those not wanted; `wanted` are rows and how many likeliest of each."""
    records: list[Record | None] = [None] * len(tokens)
    rows = mx.array([row for row, _ in wanted])
    whole = len(wanted) == len(records)
    scores = Scores(logits if whole else logits[rows], tokens if whole else tokens[rows], max(top for _, top in wanted))
    for at, (row, top) in enumerate(wanted):
        records[row] = Record(scores, at, top)
    return records


def arrays_of(records: Iterable[Record | None]) -> list[Any]:
    """Return all that must be evaluated before these can be read."""
    scores = {id(one.scores): one.scores for one in records if one is not None}
    return [array for one in scores.values() for array in one.arrays]
