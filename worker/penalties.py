"""What changes one row's logits before a token is chosen, as logits processors of mlx-lm. Main thread only.

A processor is called once for each token of its row, with the tokens so far as an array that may still be being
computed (only the last of them is looked at, and never waited for), and the row's logits (1, vocabulary), float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import mlx.core as mx
import numpy as np

from worker.jobs import Constraint, Job

_NO_PENALTY: Final = 1.0


class Penalties:
    """Repetition, frequency and presence penalty of one row.

    `repetition` divides positive and multiplies negative logits of tokens of the prompt and of the answer (Hugging
    Face's definition); `frequency` times the number of occurrences in the answer, and `presence` once, are subtracted
    (OpenAI's). The counts are kept on the device: a token costs the same however many came before.
    """

    def __init__(
        self, prompt: Sequence[int], said: Sequence[int], *, repetition: float, frequency: float, presence: float
    ) -> None:
        self._prompt = prompt
        self._said = said
        self.repetition = repetition
        self.frequency = frequency
        self.presence = presence
        #: Occurrences in the answer, (vocabulary,). None until the first call, which tells how large that is.
        self.counts: Any = None
        #: Whether a token is in the prompt or the answer, (vocabulary,).
        self.seen: Any = None

    def __call__(self, tokens: Any, logits: Any) -> Any:
        """Return the logits of the next token, `tokens` ending with the one before it."""
        group = PenaltyGroup([self])
        logits = group(tokens[-1:], logits)
        group.release()
        return logits

    def begin(self, vocabulary: int) -> None:
        """Count what is there: the token before the first one of ours is the prompt's, or in `said`."""
        said = _within(self._said, vocabulary)
        self.counts = mx.array(np.bincount(said, minlength=vocabulary).astype(np.float32))
        seen = np.zeros(vocabulary, dtype=np.bool_)
        seen[said] = seen[_within(self._prompt, vocabulary)] = True
        self.seen = mx.array(seen)


class PenaltyGroup:
    """The penalties of several rows as a few operations; holds their counts until it is released."""

    def __init__(self, rows: Sequence[Penalties]) -> None:
        self._rows = rows
        self._index = mx.arange(len(rows))
        self._repetition = _column([row.repetition for row in rows], _NO_PENALTY)
        self._frequency = _column([row.frequency for row in rows], 0.0)
        self._presence = _column([row.presence for row in rows], 0.0)
        self._counts: Any = None
        self._seen: Any = None

    def __call__(self, tokens: Any, logits: Any) -> Any:
        """Return the logits (rows, vocabulary) of the next tokens, `tokens` (rows,) being those before."""
        counted: Any = 1.0
        if self._counts is None:
            # What is the first call for a row has nothing new to count.
            counted = mx.array([0.0 if row.counts is None else 1.0 for row in self._rows])
            for row in self._rows:
                if row.counts is None:
                    row.begin(logits.shape[-1])
            self._counts = mx.stack([row.counts for row in self._rows])
            if self._repetition is not None:
                self._seen = mx.stack([row.seen for row in self._rows])
        self._counts = self._counts.at[self._index, tokens].add(counted)
        if self._repetition is not None:
            self._seen[self._index, tokens] = mx.array(True)
            repeated = mx.where(logits > 0, logits / self._repetition, logits * self._repetition)
            logits = mx.where(self._seen, repeated, logits)
        if self._frequency is not None:
            logits = logits - self._frequency * self._counts
        if self._presence is not None:
            logits = logits - self._presence * (self._counts > 0)
        return logits

    def release(self) -> None:
        """Give each row its counts back; the group is of no use any more."""
        if self._counts is None:
            return
        for at, row in enumerate(self._rows):
            row.counts = self._counts[at]
            if self._seen is not None:
                row.seen = self._seen[at]


def _column(values: Sequence[float], nothing: float) -> Any:
    """Return one value per row, (rows, 1); None if all of them mean nothing."""
    return None if all(value == nothing for value in values) else mx.array(list(values))[:, None]


class Bias:
    """Adds a number to the logits of some tokens. Ids that the model does not have are left out."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._bias = bias
        self._dense: Any = None

    def __call__(self, tokens: Any, logits: Any) -> Any:  # noqa: ARG002 - mlx-lm passes them
        """Return the logits of the next token."""
        if self._dense is None:
            dense = np.zeros(logits.shape[-1], dtype=np.float32)
            for token, value in self._bias.items():
                # Past the end would be another row's, or nobody's, memory.
                if 0 <= token < dense.size:
                    dense[token] = value
            self._dense = mx.array(dense)
        return logits + self._dense


class Constrained:
    """Lets a constraint see each token of the answer. Unlike the others it has to know the token: it waits for it."""

    def __init__(self, constraint: Constraint, said: Sequence[int]) -> None:
        self._constraint = constraint
        self._said = list(said)
        self._begun = False

    def __call__(self, tokens: Any, logits: Any) -> Any:
        """Return the logits of the next token."""
        return self.after(int(tokens[-1].item()), logits)

    def after(self, token: int, logits: Any) -> Any:
        """Return the logits of what comes after this token."""
        if self._begun:
            self._said.append(token)
        self._begun = True  # the first token seen is the prompt's last, or the last one in `said`
        return self._constraint(self._said, logits)


def make_processors(job: Job) -> list[Any]:
    """Return what the job's parameters do to its logits, in the order in which it happens. Mostly nothing."""
    processors: list[Any] = []
    if job.repetition_penalty != _NO_PENALTY or job.frequency_penalty or job.presence_penalty:
        processors.append(
            Penalties(
                job.prompt,
                job.said,
                repetition=job.repetition_penalty,
                frequency=job.frequency_penalty,
                presence=job.presence_penalty,
            )
        )
    if job.logit_bias:
        processors.append(Bias(job.logit_bias))
    if job.constraint is not None:
        processors.append(Constrained(job.constraint, job.said))
    return processors


def _within(tokens: Sequence[int], vocabulary: int) -> Any:
    ids = np.asarray(tokens, dtype=np.int64)
    return ids[ids < vocabulary]
