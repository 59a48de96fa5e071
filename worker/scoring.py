"""What the model thinks of a prompt, token by token: `echo` with `logprobs`. Main thread only.

mlx-lm's prefill throws the logits of the prompt away, so prompts that are to be scored are processed here, some tokens
in each step of the engine, and then go on in the batch with the cache made here.
"""

from collections import deque
from typing import Any, Final

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from worker.jobs import Job, Scored
from worker.logprobs import Scores

#: Logits of one chunk: 64 MiB of float32. (Tokens times vocabulary of a whole prompt would be gigabytes.)
_MAX_LOGITS: Final = 2**24


class Scoring:
    """One prompt being scored. `cache` holds what was processed of all but its last token."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.cache: list[Any] = []
        self.done = 0
        self.scores = [Scored(job.prompt[0], None, [])]

    @property
    def left(self) -> int:
        """How many tokens are to be processed: all but the last, which predicts the answer."""
        return len(self.job.prompt) - 1 - self.done


class PromptScorer:
    """Scores prompts one after another, at most `step_tokens` tokens in one step."""

    def __init__(self, model: Any, *, step_tokens: int) -> None:
        self._model = model
        self._step_tokens = step_tokens
        self._chunk = 0
        self._queue: deque[Scoring] = deque()
        #: Tokens processed so far, of all prompts.
        self.processed = 0

    def __bool__(self) -> bool:
        return bool(self._queue)

    def add(self, job: Job) -> None:
        """Queue a prompt."""
        self._queue.append(Scoring(job))

    def remove(self, job: int) -> None:
        """Forget a prompt, at whatever stage; unknown ids are ignored."""
        self._queue = deque(one for one in self._queue if one.job.id != job)

    def step(self) -> list[Scoring]:
        """Go on with the first prompt, and with the next as far as the tokens of a step go; return those done."""
        budget = self._step_tokens
        done = []
        while self._queue and budget > 0:
            scoring = self._queue[0]
            if scoring.left:
                size = min(scoring.left, self._chunk_tokens(), budget)
                self._score_chunk(scoring, size)
                budget -= size
            if not scoring.left:
                done.append(self._queue.popleft())
        return done

    def _chunk_tokens(self) -> int:
        if not self._chunk:
            # Asks for a shape; nothing is computed.
            vocabulary = int(self._model(mx.array([[0]])).shape[-1])
            self._chunk = max(1, min(self._step_tokens, _MAX_LOGITS // vocabulary))
        return self._chunk

    def _score_chunk(self, scoring: Scoring, size: int) -> None:
        if not scoring.cache:
            scoring.cache = make_prompt_cache(self._model)
        prompt, top = scoring.job.prompt, scoring.job.logprobs or 0
        first, end = scoring.done, scoring.done + size
        logits = self._model(mx.array(prompt[first:end])[None], cache=scoring.cache)[0]
        scores = Scores(logits, mx.array(prompt[first + 1 : end + 1]), top)
        mx.eval(scores.arrays, [cache.state for cache in scoring.cache])
        scoring.scores += [scores.read(row, top) for row in range(size)]
        scoring.done = end
        self.processed += size
        mx.clear_cache()
