"""Which prompts are processed next to each other, and how much of each between two decode steps. Pure policy.

A chunk has so many tokens in all, whoever's they are, so that the answers that run wait for one chunk at most. Prompts
that fit into one together are processed together. Short prompts of a model so small that its steps cost more than its
tokens go together beyond that, while no answer runs. Longer ones share a chunk between clients: each client has one of
its own under way, so that a hundred long prompts of one client leave another's first one half of every chunk.
"""

from collections.abc import Callable
from typing import Final

from worker.jobs import Job
from worker.line import Line

#: Prompts that share a chunk when they do not fit into it together. More would let all of them wait for each other.
_SHARING: Final = 8
#: While no answer runs, a chunk of prompts of at most so large a part of a chunk may have so many times its tokens, if
#: that takes no longer than this: a larger model would only keep the first ones waiting for the last.
_SHORT_PART: Final = 4
_IDLE_TIMES: Final = 4
_IDLE_S: Final = 0.1
#: With fewer tokens a step takes as long as with one, and tells nothing of what a token takes.
_TELLING: Final = 32


class PromptTurns:
    """The jobs whose prompts wait, and those whose prompts are being processed: at most `places`."""

    def __init__(self, step_tokens: int, places: int) -> None:
        self._step_tokens = step_tokens
        self._places = places
        #: Nobody is waited for here: whom the rules keep waiting has a prompt under way already.
        self._line = Line(patience=None)
        self._waiting: dict[int, Job] = {}
        #: Tokens that are not processed yet; with the last one an answer begins.
        self._left: dict[int, int] = {}
        self._answering = True
        #: Tokens in the chunk under way, and the time that one of the last took, while no answer ran beside it.
        self._going = 0
        self._token_s = float("inf")

    def add(self, job: Job) -> None:
        """Line up a prompt."""
        self._waiting[job.id] = job
        self._line.add(job.id, job.client, job.priority)

    def next(self, shares: Callable[[Job], bool], *, answering: bool = True) -> Job | None:
        """Return a job to begin with now, None if none may.

        `shares`: whether another processes its prompt for it. `answering`: whether an answer runs.
        """
        self._answering = answering
        taken = self._line.take(lambda job: shares(self._waiting[job]) or self._fits(self._waiting[job]))
        if taken is None:
            return None
        job = self._waiting.pop(taken)
        self._left[taken] = 1 if shares(job) else _length(job)
        return job

    def progress(self, job: int, left: int) -> None:
        """Note how much of a prompt is left, 0 when its answer has begun."""
        if left:
            self._left[job] = left
        else:
            self.drop(job)

    def drop(self, job: int) -> None:
        """Forget a job, wherever it is; an unknown one is ignored."""
        self._waiting.pop(job, None)
        self._left.pop(job, None)
        self._line.drop(job)

    def chunk(self) -> int:
        """Return how many tokens of each prompt go into the next chunk; it is padded to its longest."""
        under_way = [left for left in self._left.values() if left > 1]
        count = len(under_way)
        size = self._step_tokens if self._go_together(under_way) else max(1, self._step_tokens // count)
        self._going = 0 if self._answering else sum(min(left, size) for left in under_way)
        return size

    def took(self, seconds: float) -> None:
        """Note how long the step took of which `chunk` told the size."""
        if self._going >= _TELLING:
            self._token_s = seconds / self._going

    def _fits(self, job: Job) -> bool:
        under_way = {one: left for one, left in self._left.items() if left > 1}
        if len(under_way) >= self._places:
            return False
        if self._go_together([*under_way.values(), _length(job)]):
            return True
        if len(under_way) >= _SHARING:
            return False
        if not any(self._line.held_by(one) == job.client for one in under_way):
            return True
        return sum(under_way.values()) + _length(job) <= self._step_tokens

    def _go_together(self, lengths: list[int]) -> bool:
        """Return whether a chunk has room for so many tokens of each; they are padded to the longest."""
        longest = max(lengths, default=0)
        most = self._step_tokens
        if not self._answering and longest * _SHORT_PART <= most:
            most = max(most, int(min(most * _IDLE_TIMES, _IDLE_S / self._token_s)))
        return len(lengths) * longest <= most


def _length(job: Job) -> int:
    return len(job.prompt) + len(job.said)
