"""A model that needs no MLX: counts."""

import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from protocol.control import Capabilities
from protocol.data import Submit
from protocol.errors import LmxError
from protocol.spec import WorkerSpec
from tests.fault.answers import CallingAnswer, ThinkingAnswer
from tests.fault.plan import FaultPlan, commit, marker, read_plan, wait_for_byte
from worker.detok import AnswerText, StopStrings, TokenText
from worker.jobs import AT_LENGTH, AT_STOP, GOES_ON, NO_SCORES, Answer, Job, Loaded, Prepared, Token
from worker.prompt import check_stops

#: Prompt "tokens" that carry a fault to the engine: base + index of the word, then its numbers.
_WORDS = ("abort", "segv", "kill", "exit", "raise", "freeze", "seize", "leak", "fork", "tokens", "ballast", "drop")
_MARKED = -1
_ANSWERS: dict[str, Callable[[Answer], Answer]] = {"think": ThinkingAnswer, "call": CallingAnswer}


def text_of(tokens: list[int]) -> str:
    return "".join(f"tok{token} " for token in tokens)


class CountingBackend:
    """`worker.jobs.Backend`: the n-th token of each answer is n; the first step of a job is its prefill."""

    scores = NO_SCORES

    def __init__(self, plan: FaultPlan) -> None:
        self._plan = plan
        self._jobs: dict[int, tuple[Job, int]] = {}
        self._total = 0
        self._next_step_at = 0.0
        self._ballast: list[mmap.mmap] = []
        if plan.ballast_mb:
            self._hold(plan.ballast_mb)
        self._step_pipe = os.open(plan.step_pipe, os.O_RDONLY) if plan.step_pipe else None

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def prefilling(self) -> bool:
        return any(done < 0 for _, done in self._jobs.values())

    def insert(self, job: Job) -> None:
        self._jobs[job.id] = (job, -1)

    def remove(self, jobs: Sequence[int]) -> None:
        for job in jobs:
            self._jobs.pop(job, None)

    def step(self) -> list[Token]:
        self._pace()
        tokens = []
        for number, (job, done) in list(self._jobs.items()):
            self._maybe_fail(job, max(0, done))
            if done < 0:
                self._carry(job)
                self._jobs[number] = (job, len(job.said))
                continue
            self._total += 1
            full = done + 1 - len(job.said) == job.max_tokens
            end = AT_LENGTH if full else AT_STOP if done == self._answer_tokens(job) else GOES_ON
            tokens.append((number, done, end))
            if end == GOES_ON:
                self._jobs[number] = (job, done + 1)
            else:
                del self._jobs[number]
        if self._plan.after_tokens and self._total >= self._plan.after_tokens:
            commit(self._plan.deed, self._plan)
        return tokens

    def _pace(self) -> None:
        if self._step_pipe is not None:
            os.read(self._step_pipe, 1)
            return
        now = time.monotonic()
        wait = self._next_step_at - now
        if wait > 0:
            time.sleep(wait)
        self._next_step_at = max(now, self._next_step_at) + 1 / self._plan.tokens_per_s

    def _answer_tokens(self, job: Job) -> int:
        if job.prompt[0] == _MARKED and _WORDS[job.prompt[1]] == "tokens":
            return job.prompt[2]
        return self._plan.answer_tokens

    def _hold(self, megabytes: int) -> None:
        """Occupy memory that the allocator does not keep when it is dropped."""
        held = mmap.mmap(-1, megabytes * 1024 * 1024)
        for place in range(0, len(held), mmap.PAGESIZE):
            held[place] = 1
        self._ballast.append(held)

    def _carry(self, job: Job) -> None:
        """Take up or drop ballast, if that is what the job says."""
        if job.prompt[0] != _MARKED:
            return
        if _WORDS[job.prompt[1]] == "ballast":
            self._hold(job.prompt[2])
        elif _WORDS[job.prompt[1]] == "drop":
            for held in self._ballast:
                held.close()
            self._ballast.clear()

    def _maybe_fail(self, job: Job, done: int) -> None:
        if job.prompt[0] != _MARKED:
            return
        word, numbers = _WORDS[job.prompt[1]], job.prompt[2 : 2 + job.prompt[-1]]
        if word in {"tokens", "ballast", "drop"}:
            return
        code = numbers.pop(0) if word == "exit" and numbers else None
        if done >= (numbers[0] if numbers else 0):
            commit(word, FaultPlan(words=self._plan.words), code)


def prepare(submit: Submit, plan: FaultPlan) -> Prepared:
    """Make one "token" of each word, and of the marker what the engine understands."""
    inputs = [text for text in submit.inputs if isinstance(text, str)]
    texts = [message.content for message in submit.messages] or inputs or [""]
    words = sum(len(text.split()) for text in texts) or 1
    if words >= plan.max_model_len:
        msg = f"The prompt has {words} tokens; this model's context is {plan.max_model_len} tokens"
        raise LmxError("context_length_exceeded", msg, param="messages")
    stops = check_stops(submit.sampling.stop)
    word, numbers = marker(texts[-1])
    prompt = [0] * words
    if word in _WORDS:
        prompt = [_MARKED, _WORDS.index(word), *numbers, len(numbers)]
    room = plan.max_model_len - len(prompt)
    limit = room if submit.sampling.max_tokens is None else min(submit.sampling.max_tokens, room)
    answer = AnswerText(TokenText(text_of, frozenset()), StopStrings(stops))
    return Prepared(prompt, limit, _ANSWERS[word](answer) if word in _ANSWERS else answer)


def load(spec: WorkerSpec, report: Callable[[int, int, str], None]) -> Loaded:
    """Pretend to load: bytes move in `load_steps` steps over `load_s`."""
    plan = read_plan(spec)
    report(0, plan.weight_bytes, "imports")
    if plan.load_pipe:
        wait_for_byte(plan.load_pipe)
    for step in range(1, plan.load_steps + 1):
        time.sleep(plan.load_s / plan.load_steps)
        report(plan.weight_bytes * step // plan.load_steps, plan.weight_bytes, "weights")
        if plan.at == "loading" and step * 2 >= plan.load_steps:
            commit(plan.deed, plan)

    passed = False

    def canary() -> None:
        nonlocal passed
        if passed:  # one of an idle worker
            if plan.at == "idle":
                commit(plan.deed, plan)
            return
        passed = True
        if plan.at == "warming":
            if plan.warming_pipe:
                wait_for_byte(plan.warming_pipe)
            else:
                time.sleep(0.1)  # so that the supervisor has heard of it
            commit(plan.deed, plan)
        if plan.after_ready_s:
            timer = threading.Timer(plan.after_ready_s, commit, (plan.deed, plan))
            timer.daemon = True
            timer.start()

    capabilities: dict[str, Any] = {
        "max_model_len": plan.max_model_len,
        "weight_bytes": plan.weight_bytes,
        "kinds": ["chat"],
        "max_concurrent_requests": spec.models.max_concurrent_requests,
    }
    return Loaded(
        backend=CountingBackend(plan),
        capabilities=Capabilities(**capabilities),
        prepare=lambda submit: prepare(submit, plan),
        canary=canary,
        memory=lambda: (plan.weight_bytes, 0, plan.weight_bytes),
        time_step=lambda: plan.step_s,
    )
