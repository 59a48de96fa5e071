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
    """Repetition, frequency and presence penalty.

    `repetition` divides positive and multiplies negative logits of tokens of the prompt and of the answer (Hugging
    Face's definition); `frequency` times the number of occurrences in the answer, and `presence` once, are subtracted
    (OpenAI's). The counts are kept on the device, a token costs the same however many came before.
    """

    def __init__(
        self, prompt: Sequence[int], said: Sequence[int], *, repetition: float, frequency: float, presence: float
    ) -> None:
        self._prompt = prompt
        self._said = said
        self._repetition = repetition
        self._frequency = frequency
        self._presence = presence
        #: Occurrences in the answer, (vocabulary,). None until the first call, which tells how large that is.
        self._counts: Any = None
        #: Whether a token is in the prompt or the answer, (vocabulary,).
        self._seen: Any = None

    def __call__(self, tokens: Any, logits: Any) -> Any:
        """Return the logits of the next token, `tokens` ending with the one before it."""
        if self._counts is None:
            self._begin(logits.shape[-1])
        else:
            self._count(tokens[-1:])
        if self._repetition != _NO_PENALTY:
            repeated = mx.where(logits > 0, logits / self._repetition, logits * self._repetition)
            logits = mx.where(self._seen, repeated, logits)
        if self._frequency:
            logits = logits - self._frequency * self._counts
        if self._presence:
            logits = logits - self._presence * (self._counts > 0)
        return logits

    def _begin(self, vocabulary: int) -> None:
        """Count what is there: the token before the first one of ours is the prompt's, or in `said`."""
        said = _within(self._said, vocabulary)
        self._counts = mx.array(np.bincount(said, minlength=vocabulary).astype(np.float32))
        if self._repetition != _NO_PENALTY:
            seen = np.zeros(vocabulary, dtype=np.bool_)
            seen[said] = seen[_within(self._prompt, vocabulary)] = True
            self._seen = mx.array(seen)

    def _count(self, token: Any) -> None:
        self._counts = self._counts.at[token].add(1.0)
        if self._seen is not None:
            self._seen[token] = mx.array([True])


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
