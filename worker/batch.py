"""The batch of one model on `mlx_lm.generate.BatchGenerator`. Main thread only."""

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from mlx_lm.generate import BatchGenerator

from worker.jobs import AT_LENGTH, AT_STOP, GOES_ON, Constraint, Job, Token
from worker.sampling import Samplers

#: Prompts whose chunks are processed together. More makes one chunk, and so the wait of the others, longer.
_PREFILL_BATCH: Final = 8
_ENDS: Final = {None: GOES_ON, "stop": AT_STOP, "length": AT_LENGTH}


def neutralise_wired_limit() -> None:
    """Keep mlx-lm from wiring most of the machine's memory, for every generator made from now on.

    `maybe_set_recommended_wired_limit` would do so in each process, and two such processes have taken a Mac down
    (mlx#3186). Its own answer for a device without a recommendation is None, which every caller takes to mean "leave
    the limit alone"; it is imported by name, so it is replaced where it is looked up.
    """
    for module in ("mlx_lm.utils", "mlx_lm.generate"):
        # mlx_lm.generate as an attribute is a function of the same name; import_module returns the module.
        importlib.import_module(module).maybe_set_recommended_wired_limit = lambda: None  # type: ignore[attr-defined]


class BatchBackend:
    """`worker.jobs.Backend` on a BatchGenerator that holds at most `slots` sequences at once."""

    def __init__(self, model: Any, eos: Iterable[int], *, slots: int, prefill_tokens: int) -> None:
        neutralise_wired_limit()
        self._generator = BatchGenerator(
            model,
            stop_tokens=[[token] for token in sorted(eos)],
            completion_batch_size=slots,
            prefill_batch_size=min(_PREFILL_BATCH, slots),
            prefill_step_size=prefill_tokens,
        )
        self._samplers = Samplers()
        self._jobs: dict[int, int] = {}
        self._uids: dict[int, int] = {}
        self._before_first_token: set[int] = set()

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def prefilling(self) -> bool:
        """Whether some job has no token yet."""
        return bool(self._before_first_token)

    def insert(self, job: Job) -> None:
        """Queue the job in the generator; it joins the batch at the next step that has room."""
        sampler = self._samplers.of(job.temperature, job.top_p, job.seed, len(job.said))
        processors = [] if job.constraint is None else [_constrained(job.constraint, len(job.prompt))]
        (uid,) = self._generator.insert_segments(
            [[job.prompt + job.said]], [job.max_tokens], samplers=[sampler], logits_processors=[processors]
        )
        self._jobs[uid] = job.id
        self._uids[job.id] = uid
        self._before_first_token.add(uid)

    def remove(self, jobs: Sequence[int]) -> None:
        """Take jobs out at any stage: not started, in prefill, in decode."""
        uids = [uid for uid in (self._uids.pop(job, None) for job in jobs) if uid is not None]
        for uid in uids:
            del self._jobs[uid]
            self._before_first_token.discard(uid)
        if uids:
            self._generator.remove(uids)

    def step(self) -> list[Token]:
        """Run one decode step of all sequences, then one prefill chunk."""
        _, responses = self._generator.next()
        jobs = self._jobs
        tokens = [(jobs[r.uid], r.token, _ENDS[r.finish_reason]) for r in responses]
        if self._before_first_token:
            self._before_first_token.difference_update([r.uid for r in responses])
        for r in responses:
            if r.finish_reason is not None:
                del self._uids[jobs.pop(r.uid)]
        return tokens

    def generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Return greedy tokens of one prompt, run alone: the canary, and the reference in tests."""
        self.insert(Job(id=-1, prompt=prompt, max_tokens=max_tokens))
        tokens: list[int] = []
        while len(self):
            tokens += [token for _, token, _ in self.step()]
        return tokens


def _constrained(constraint: Constraint, prompt_tokens: int) -> Callable[[Any, Any], Any]:
    return lambda context, logits: constraint(context[prompt_tokens:].tolist(), logits)
