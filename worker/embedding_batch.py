"""The batch of an encoder: sequences of all requests go through it together, each request is answered in one piece.

Main thread only.
"""

from collections.abc import Sequence
from typing import Final

import mlx.core as mx

from worker.bert import Bert
from worker.embedding_turns import Piece, Turns, buckets
from worker.jobs import NO_SCORES, EncodeJob, Job, Whole

#: So short a vector has no direction; dividing by it would make one of noise.
_TINY: Final = 1e-12
_FLOAT_BYTES: Final = 4


class _Open:
    """A request that is being encoded."""

    def __init__(self, job: EncodeJob) -> None:
        self.job = job
        self.left = len(job.ends)
        #: Rows of several steps, and which sequences of the request they are.
        self.rows: list[mx.array] = []
        self.numbers: list[int] = []

    def sequence(self, number: int) -> list[int]:
        """Return the tokens of one sequence."""
        ends = self.job.ends
        return self.job.prompt[ends[number - 1] if number else 0 : ends[number]]


class EmbeddingBackend:
    """`worker.jobs.Backend` on an encoder; a step takes at most `step_tokens` tokens, without padding."""

    #: It brings no tokens.
    scores = NO_SCORES

    def __init__(self, model: Bert, *, scores_pairs: bool, step_tokens: int) -> None:
        self._model = model
        self._scores_pairs = scores_pairs
        self._step_tokens = step_tokens
        self._turns = Turns()
        self._open: dict[int, _Open] = {}

    def __len__(self) -> int:
        return len(self._open)

    @property
    def prefilling(self) -> bool:
        """Every step of an encoder is one."""
        return bool(self._open)

    def insert(self, job: Job) -> None:
        """Line up a request."""
        assert isinstance(job, EncodeJob), "an encoder is given nothing else"
        self._open[job.id] = _Open(job)
        starts = [0, *job.ends]
        self._turns.add(job.id, [end - start for start, end in zip(starts, job.ends, strict=False)])

    def remove(self, jobs: Sequence[int]) -> None:
        """Forget requests, whatever of them is done."""
        for job in jobs:
            self._turns.drop(job)
            self._open.pop(job, None)

    def step(self) -> list[Whole]:
        """Encode the next sequences; return the requests that are complete with them."""
        for bucket in buckets(self._turns.take(self._step_tokens)):
            self._encode(bucket)
        complete = [job for job in self._open.values() if not job.left]
        for job in complete:
            del self._open[job.job.id]
        return [self._result(job) for job in complete]

    def run(self, job: EncodeJob) -> Whole:
        """Return the answer to one request, run alone: the canary, and the reference in tests."""
        self.insert(job)
        while True:
            for result in self.step():
                return result

    def _encode(self, bucket: list[Piece]) -> None:
        width = bucket[0].length
        jobs = [self._open[piece.job] for piece in bucket]
        tokens = [job.sequence(piece.number) for job, piece in zip(jobs, bucket, strict=True)]
        out = self._model(
            mx.array([row + [0] * (width - len(row)) for row in tokens]),
            mx.array([piece.length for piece in bucket]),
            mx.array([job.job.seconds[piece.number] for job, piece in zip(jobs, bucket, strict=True)]),
        )
        by_job: dict[int, list[int]] = {}
        for row, piece in enumerate(bucket):
            by_job.setdefault(piece.job, []).append(row)
        for job_id, rows in by_job.items():
            job = self._open[job_id]
            job.rows.append(out[mx.array(rows)])
            job.numbers += [bucket[row].number for row in rows]
            job.left -= len(rows)
        mx.eval(out, [self._open[job].rows[-1] for job in by_job])

    def _result(self, job: _Open) -> Whole:
        asked = job.job
        rows = mx.concatenate(job.rows)[mx.argsort(mx.array(job.numbers))]
        if self._scores_pairs:
            return Whole(asked.id, [], _floats(rows[:, 0]))
        if asked.dimensions:
            rows = rows[:, : asked.dimensions]
        rows = rows / mx.maximum(mx.linalg.norm(rows, axis=1, keepdims=True), _TINY)
        if asked.ranks:
            return Whole(asked.id, [], _floats(rows[1:] @ rows[0]))
        mx.eval(rows)
        width = _FLOAT_BYTES * rows.shape[1]
        data = bytes(memoryview(rows))  # type: ignore[arg-type] # it is one, but its stub does not say so
        return Whole(asked.id, [data[at : at + width] for at in range(0, len(data), width)], [])


def _floats(scores: mx.array) -> list[float]:
    return [float(score) for score in scores.tolist()]  # type: ignore[union-attr, arg-type]
