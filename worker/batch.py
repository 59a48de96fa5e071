"""The batch of one model on `mlx_lm.generate.BatchGenerator`. Main thread only."""

import importlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from time import perf_counter
from typing import Any, Final

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import can_trim_prompt_cache

from worker import lean
from worker.groups import Groups
from worker.jobs import AT_LENGTH, AT_STOP, GOES_ON, NO_SCORES, NO_TOKEN, Job, Scored, Scores, Token
from worker.logprobs import Record, Recorder
from worker.penalties import make_processors
from worker.prefill import PromptTurns
from worker.prefix_cache import NoPrefixes, PrefixCache
from worker.sampling import Samplers, Spread
from worker.scoring import PromptScorer, Scoring

#: An engine with nothing else to do waits so long at a time for what is being read.
_READ_WAIT_S: Final = 0.02
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
    """`worker.jobs.Backend` on a BatchGenerator that holds at most `slots` sequences at once.

    A job is in the scorer, in a group waiting for another's cache, or in the generator, where it has a uid.
    """

    def __init__(
        self,
        model: Any,
        eos: Iterable[int],
        *,
        slots: int,
        prefill_tokens: int,
        plain: bool = False,
        prefixes: PrefixCache | None = None,
    ) -> None:
        """`plain` keeps mlx-lm's own batch, which is slower: what `worker.lean` is tested against."""
        neutralise_wired_limit()
        self._generator = BatchGenerator(
            model,
            stop_tokens=[[token] for token in sorted(eos)],
            completion_batch_size=slots,
            prefill_batch_size=slots,  # how many there are is for `worker.prefill` to say
            prefill_step_size=prefill_tokens,
        )
        self.is_lean = not plain and lean.install(self._generator, model)
        self._samplers = Samplers()
        self._scorer = PromptScorer(model, step_tokens=prefill_tokens)
        self._groups = Groups()
        self._prompts = PromptTurns(prefill_tokens, slots)
        self._jobs: dict[int, int] = {}
        self._uids: dict[int, int] = {}
        self._unanswered: set[int] = set()
        #: Leaders of groups in the generator, by uid, and how many tokens their followers can take over.
        self._leading: dict[int, int] = {}
        self._recorders: dict[int, Recorder] = {}
        self._prompt_scores: dict[int, list[Scored]] = {}
        #: All jobs, whatever their stage.
        self._alive: set[int] = set()
        self._scores: Scores = NO_SCORES
        self._prefixes = prefixes or NoPrefixes()
        #: Jobs whose prefix is being read, and whether each leads a group.
        self._searching: dict[int, tuple[Job, Any, bool]] = {}

    def __len__(self) -> int:
        return len(self._alive)

    @property
    def prefilling(self) -> bool:
        """Whether some job has no token yet."""
        return bool(self._unanswered)

    @property
    def scores(self) -> Scores:
        """What the last step's tokens were worth, for the jobs that asked."""
        return self._scores

    def insert(self, job: Job) -> None:
        """Queue the job; it begins at a step that has room for its prompt, or once that has been processed."""
        self._alive.add(job.id)
        self._unanswered.add(job.id)
        if job.scores_prompt:  # has chunks of its own
            self._begin(job)
        else:
            self._prompts.add(job)

    def _begin(self, job: Job) -> None:
        if self._groups.wait(job):
            self._prompts.drop(job.id)
            return
        cache = None if job.scores_prompt else self._cache_of_living(job)
        if cache is None:
            leads = self._groups.lead(job)
            self._start(job, leads=leads)
        else:
            self._groups.follow(job)
            self._enter(job, cache, len(job.prompt) - 1)

    def remove(self, jobs: Sequence[int]) -> None:
        """Take jobs out at any stage: not started, in prefill, in decode."""
        gone = [job for job in jobs if job in self._alive]
        uids = [self._uids[job] for job in gone if job in self._uids]
        if uids:
            self._generator.remove(uids)
        successors = []
        for job in gone:
            self._scorer.remove(job)
            successors.append(self._forget(job))
        for successor in successors:
            # One that was only now removed itself has a successor further down the list.
            if successor is not None and successor.id in self._alive:
                self._start(successor, leads=True)

    def step(self) -> list[Token]:
        """Run one decode step of all sequences, then one prefill chunk and one chunk of prompts to be scored."""
        self._begin_prompts()
        began = perf_counter()
        prompts, responses = self._generator.next()
        self._prompts.took(perf_counter() - began)
        tokens = [(self._jobs[r.uid], r.token, _ENDS[r.finish_reason]) for r in responses]
        self._scores = self._collect_scores(responses) if self._recorders and responses else NO_SCORES
        if self._unanswered:
            self._unanswered.difference_update([job for job, _, _ in tokens])
        for job, _, end in tokens:
            if end != GOES_ON:
                self._forget(job)
        if prompts:
            self._note_progress(prompts)
        if self._scorer:
            with mx.stream(self._generator.stream):
                scored = self._scorer.step()
            for scoring in scored:
                tokens += self._go_on_scored(scoring)
        with mx.stream(self._generator.stream):
            self._prefixes.harvest(*lean.batches_of(self._generator), prefilled=bool(prompts))
        return tokens

    def _begin_prompts(self) -> None:
        """Put prompts into the generator: those whose prefix has been read, and those whose turn it is."""
        wait_s = _READ_WAIT_S if self._searching and not (self._uids or self._scorer) else 0.0
        self._prefixes.take_in([search for _, search, _ in self._searching.values()], wait_s)
        for job, search, leads in list(self._searching.values()):
            if self._prefixes.arrived(search):
                del self._searching[job.id]
                self._enter_found(job, search, leads=leads)
        answering = len(self._unanswered) < len(self._alive)
        while (next_job := self._prompts.next(self._groups.shares, answering=answering)) is not None:
            self._begin(next_job)
        self._generator.prefill_step_size = self._prompts.chunk()

    def _note_progress(self, prompts: Iterable[Any]) -> None:
        """Note how far prompts have come; one that leads a group and is done is shared."""
        for response in prompts:
            job_id = self._jobs.get(response.uid)
            if job_id is not None:
                done, total = response.progress
                self._prompts.progress(job_id, 0 if response.end_of_prompt else total - done)
                if self._leading.get(response.uid) == done:
                    self._share_prompt(response.uid)

    def generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Return greedy tokens of one prompt, run alone: the canary, and the reference in tests."""
        self.insert(Job(id=-1, prompt=prompt, max_tokens=max_tokens))
        tokens: list[int] = []
        while len(self):
            tokens += [token for _, token, _ in self.step()]
        return tokens

    # -- from one stage to the next ---------------------------------------------------------------------------

    def _start(self, job: Job, *, leads: bool) -> None:
        """Begin with a job whose prompt nobody has processed."""
        if job.scores_prompt:
            self._scorer.add(job)
            return
        # The last token is always processed; of a group's leader the last two: the others wait for its prompt.
        most = len(job.prompt) - 2 if leads else len(job.prompt) + len(job.said) - 1
        search = self._prefixes.search(job.prompt + job.said, job.salt, most)
        if self._prefixes.arrived(search):
            self._enter_found(job, search, leads=leads)
        else:
            self._searching[job.id] = (job, search, leads)

    def _enter_found(self, job: Job, search: Any, *, leads: bool) -> None:
        with mx.stream(self._generator.stream):
            cache, done = self._prefixes.give(search)
        job.reused.tokens = min(done, len(job.prompt))
        self._enter(job, cache, done, leads=leads, stop_at=search.stop_at)
        self._prompts.progress(job.id, len(job.prompt) + len(job.said) - done)
        self._prefixes.follow(self._uids[job.id], search, done)

    def _enter(
        self, job: Job, cache: list[Any] | None = None, done: int = 0, *, leads: bool = False, stop_at: int = 0
    ) -> None:
        """Put a job into the generator; `cache` has its first `done` tokens. No chunk reaches over `stop_at`."""
        recorders = [] if job.logprobs is None else [Recorder(job.logprobs)]
        spread = Spread(job.temperature, job.top_p, job.top_k, job.min_p)
        tokens, begun = job.prompt + job.said, len(job.prompt) - 1
        done = 0 if cache is None else done
        cuts = [done, *([stop_at] if stop_at > done else []), *([begun] if leads else []), len(tokens)]
        segments = [tokens[first:end] for first, end in pairwise(cuts)]
        (uid,) = self._generator.insert_segments(
            [segments],
            [job.max_tokens],
            caches=None if cache is None else [cache],
            all_tokens=None if cache is None else [tokens[:done]],
            samplers=[self._samplers.of(spread, job.seed, len(job.said))],
            logits_processors=[recorders + make_processors(job)],
        )
        if leads:
            self._leading[uid] = begun - done
        self._jobs[uid] = job.id
        self._uids[job.id] = uid
        if recorders:
            self._recorders[uid] = recorders[0]

    def _forget(self, job: int) -> Job | None:
        """Forget a job that is over; return the one that has to process their common prompt instead of it."""
        self._alive.remove(job)
        self._unanswered.discard(job)
        self._prompts.drop(job)
        self._prompt_scores.pop(job, None)
        searching = self._searching.pop(job, None)
        if searching is not None:
            self._prefixes.abandon(searching[1])
        uid = self._uids.pop(job, None)
        if uid is not None:
            del self._jobs[uid]
            self._prefixes.leave(uid)
            self._leading.pop(uid, None)
            self._recorders.pop(uid, None)
        return self._groups.leave(job)

    def _share_prompt(self, uid: int) -> None:
        """Let those who waited for the prompt of this sequence go on with a copy of its cache."""
        del self._leading[uid]
        followers = self._groups.release(self._jobs[uid])
        if not followers:
            return
        cache = self._copy_cache(uid)
        for job in followers:
            self._enter(job, cache, len(job.prompt) - 1)

    def _go_on_scored(self, scoring: Scoring) -> list[Token]:
        """Let a scored prompt, and those who waited for it, go on with its cache; return those without a token."""
        ended: list[Token] = []
        for job in (scoring.job, *self._groups.release(scoring.job.id)):
            if job.scores_prompt:
                self._prompt_scores[job.id] = scoring.scores
            if job.max_tokens > 0:
                self._enter(job, scoring.cache or None, len(job.prompt) - 1)
                continue
            ended.append((job.id, NO_TOKEN, AT_LENGTH))
            self._scores = {**self._scores, job.id: scoring.scores}
            self._forget(job.id)
        return ended

    def _collect_scores(self, responses: Iterable[Any]) -> Scores:
        """Return the scores of the tokens just generated, behind those of the prompt that come with the first one."""
        scores: dict[int, Sequence[Scored]] = {}
        for response in responses:
            recorder = self._recorders.get(response.uid)
            if recorder is None:
                continue
            job, record = self._jobs[response.uid], response.logprobs
            score = record.read() if isinstance(record, Record) else recorder.read()
            scores[job] = [*self._prompt_scores.pop(job, ()), score]
        return scores

    # -- caches -----------------------------------------------------------------------------------------------

    def _cache_of_living(self, job: Job) -> list[Any] | None:
        """Return a cache of the job's prompt without its last token, from a sequence that began with it."""
        wanted = job.prompt[:-1]
        for other in self._groups.living(job):
            uid = self._uids.get(other)
            cache = None if uid is None else self._copy_cache(uid, wanted)
            if cache is not None:
                return cache
        return None

    def _copy_cache(self, uid: int, wanted: list[int] | None = None) -> list[Any] | None:
        """Return a sequence's cache, cut down to the wanted tokens; None where the kind of cache cannot do that.

        Inserting it copies it once more, so that one copy serves any number of jobs.
        """
        if not lean.can_copy_caches(self._generator):
            return None
        with mx.stream(self._generator.stream):
            found = self._generator.extract_cache([uid]).get(uid)
            if found is None:
                return None
            cache, tokens = found
            if wanted is None:
                return list(cache)
            extra = len(tokens) - len(wanted)
            if extra < 0 or tokens[: len(wanted)] != wanted:
                return None
            if extra and not (can_trim_prompt_cache(cache) and {layer.trim(extra) for layer in cache} == {extra}):
                return None
            return list(cache)
