"""The book of requests of one worker: who waits, who holds a slot, who has to go. IO thread only.

Pure policy: the clock is an argument, messages and commands go out through two callables, and nothing here knows
sockets or MLX. A request is `waiting` (in our own queue) or `running` (handed to the engine: it holds a slot).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final

import msgspec

from protocol.data import (
    Abort,
    Accepted,
    Delta,
    Embedded,
    Failed,
    Kind,
    Ranked,
    Refused,
    Step,
    Submit,
    Tokenized,
)
from protocol.errors import ERRORS, LmxError
from protocol.kvsize import KvShape
from protocol.logs import event, exception_event
from protocol.tracing import NullTracer, Tracer, traced
from worker.deltas import end_whole, join, make_delta
from worker.entry import Limits, Request, enter
from worker.jobs import AT_STOP, GOES_ON, Command, Job, Prepared, Remove, Scored, Stepped, Vocabulary
from worker.room import Room
from worker.slots import Slots

Reply = Accepted | Step | Refused | Failed | Embedded | Ranked | Tokenized

NEVER: Final = float("inf")
#: What takes no slot.
TEXT_KINDS: Final = frozenset({Kind.TOKENIZE, Kind.DETOKENIZE})


class Book:
    """Admission, slots, deadlines and answers.

    `send(gateway, message)` never raises and never calls back; a gateway found gone is reported later with
    `forget_gateway`. `command` reaches the engine in order, so a slot freed by a `Remove` may be given away at once:
    the engine removes before it inserts.
    """

    #: Makes the request out of what a gateway sent.
    _enter = staticmethod(enter)

    def __init__(
        self,
        limits: Limits,
        incarnation: int,
        prepare: Callable[[Submit], Prepared],
        vocabulary: Vocabulary | None = None,
        *,
        tokenize: Callable[[Submit], tuple[list[int], str]] | None = None,
        send: Callable[[bytes, Reply], None],
        command: Callable[[Command], None],
        room: Room | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """`room` is the cache that may be promised; without it as much as is asked for."""
        self._limits = limits
        self._slots = Slots(limits, room or Room(KvShape(), 0))
        self._incarnation = incarnation
        self._prepare = prepare
        self._vocabulary = vocabulary
        self._tokenize = tokenize or partial(tokenize_with, vocabulary)
        self._send = send
        self._command = command
        self._waiting: dict[int, Request] = {}
        self._running: dict[int, Request] = {}
        self._jobs: dict[tuple[bytes, int], int] = {}
        self._last_job = 0
        self._tracer = tracer or NullTracer()
        self._closed_for: LmxError | None = None
        #: Requests that were ever admitted.
        self.admitted = 0
        #: When `expire` has something to do; earlier never, maybe nothing by then.
        self.next_expiry = NEVER

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    @property
    def slots(self) -> Slots:
        """Who may run."""
        return self._slots

    @property
    def gateways(self) -> set[bytes]:
        """Gateways with open requests."""
        return {gateway for gateway, _ in self._jobs}

    # -- what gateways ask ------------------------------------------------------------------------------------

    def submit(self, gateway: bytes, submit: Submit, now: float) -> None:
        """Admit, queue or refuse a request."""
        if (gateway, submit.rid) in self._jobs:
            event("request_duplicate", level="WARNING", trace=submit.trace, rid=submit.rid)
            return
        try:
            if submit.kind in TEXT_KINDS:
                self._send(gateway, self._tokenized(submit))
                return
            request = self._admit(gateway, submit, now)
        except LmxError as error:
            if error.__cause__ is not None:
                exception_event("prompt_refused", error.__cause__, trace=submit.trace, rid=submit.rid)
            self.refuse(gateway, submit, error)
            return
        if request.whole:
            self._end_whole(request)
            return
        displaced = self._slots.displace(request)
        if displaced is not None:
            self._end(displaced, self._slots.busy("others had waited for their first turn"), now)
        self.admitted += 1
        request.span = self._tracer.start("generate", request.traceparent, {"lmx.incarnation": self._incarnation})
        self._jobs[request.key] = request.job.id
        self._waiting[request.job.id] = request
        self._slots.wait(request)
        self._fill_slots(now)
        self._expect(request)

    def refuse(self, gateway: bytes, submit: Submit, error: LmxError) -> None:
        """Tell the gateway that a request is not taken."""
        self._refuse(gateway, submit.rid, error)
        event("request_refused", trace=submit.trace, rid=submit.rid, code=error.code)

    def check_room(self, submit: Submit, coming: int = 0) -> None:
        """Raise `LmxError` if a request cannot be taken; `coming` are on their way and wait too."""
        if self._closed_for is not None:
            raise self._closed_for
        if self._slots.paused and submit.resume is None:
            raise LmxError("load_shedding", "The model's process is short of memory. Try again in a moment.")
        if not submit.deadline_s > 0:  # also NaN
            raise _timed_out()
        self._slots.check(submit, coming)

    def abort(self, gateway: bytes, message: Abort, now: float) -> None:
        """Drop requests their gateway no longer wants, without a word to it."""
        jobs = [self._jobs[gateway, rid] for rid in message.rids if (gateway, rid) in self._jobs]
        self._drop(jobs, "aborted", now)

    def forget_gateway(self, gateway: bytes, now: float) -> None:
        """Drop every request of a gateway that is gone."""
        self._drop([job for (owner, _), job in self._jobs.items() if owner == gateway], "gateway_gone", now)

    def fail_slow(self, gateway: bytes, rid: int, now: float) -> None:
        """End a request whose answer its gateway does not read."""
        job = self._jobs.get((gateway, rid))
        if job is not None:
            error = LmxError("internal_error", "The answer was not read fast enough")
            self._end(job, error, now)

    # -- what the engine says ---------------------------------------------------------------------------------

    def on_steps(self, steps: Sequence[Stepped], now: float) -> None:
        """Turn the tokens of engine steps, at least one, into one message per gateway."""
        deltas: dict[bytes, dict[int, Delta]] = {}
        running = self._running
        for stepped in steps:
            for job, token, end in stepped.tokens:
                request = running.get(job)
                if request is None:  # removed while this step ran
                    continue
                failed = request.answer.failed if end == AT_STOP else None
                if failed is not None:
                    self._send_deltas(stepped.step, deltas)  # what it said before comes before
                    self._end(job, failed, now)
                    continue
                scored = stepped.scores.get(job, ()) if stepped.scores else ()
                delta = self._advance(request, token, end, scored, now)
                of_gateway = deltas.setdefault(request.gateway, {})
                before = of_gateway.get(job)
                of_gateway[job] = delta if before is None else join(before, delta)
        self._send_deltas(steps[-1].step, deltas)
        if self._waiting:
            self._fill_slots(now)

    def _send_deltas(self, step: int, deltas: dict[bytes, dict[int, Delta]]) -> None:
        for gateway, of_gateway in deltas.items():
            self._send(gateway, Step(self._incarnation, step, list(of_gateway.values())))
        deltas.clear()

    def _advance(self, request: Request, token: int, end: int, scored: Sequence[Scored], now: float) -> Delta:
        delta = make_delta(request, token, end, scored, self._vocabulary)
        if request.completion_tokens >= request.grow_at:
            self._slots.grow(request)
        if delta.finish is not None:
            if end == GOES_ON:  # a stop string
                self._command(Remove([request.job.id]))
            self._close(request, delta.finish.name.lower(), now)
        return delta

    # -- what time and the supervisor say ---------------------------------------------------------------------

    def expire(self, now: float) -> None:
        """End what waited too long for a slot or reached its deadline."""
        for job in [j for j, r in self._waiting.items() if now >= min(r.slot_by, r.deadline_at)]:
            if now >= self._waiting[job].deadline_at:
                self._end(job, _timed_out(), now)
            else:
                self._end(job, self._slots.late(self._waiting[job]), now)
        for job in [j for j, r in self._running.items() if now >= r.deadline_at]:
            self._end(job, _timed_out(), now)
        self.next_expiry = NEVER
        for requests in (self._waiting, self._running):
            for request in requests.values():
                self._expect(request)

    def pause(self, now: float, *, paused: bool) -> None:
        """Begin nothing new while memory is short; what runs goes on, and so does what began in another process."""
        self._slots.paused = paused
        self._slots.unstick()
        if not paused:
            self._fill_slots(now)

    def limit(self, slots: int, now: float) -> None:
        """Let so many run at once, 0 for all that are configured; what runs goes on."""
        before = self._slots.limit
        self._slots.set_limit(slots)
        if self._slots.limit != before:
            event("concurrency_changed", slots=self._slots.limit)
        self._fill_slots(now)

    def close_admission(self, error: LmxError, now: float) -> None:
        """Refuse everything from now on, and what still waits, with `error`; what runs goes on."""
        self._closed_for = error
        for job in list(self._waiting):
            self._end(job, error, now)

    def fail_all(self, error: LmxError, now: float, *, retryable: bool) -> None:
        """End every request with `error`."""
        for job in [*self._waiting, *self._running]:
            self._end(job, error, now, retryable=retryable)

    # -- inside -----------------------------------------------------------------------------------------------

    def _tokenized(self, submit: Submit) -> Tokenized:
        """Answer at once: it takes no slot, and the engine does not hear of it."""
        if self._closed_for is not None:
            raise self._closed_for
        tokens, text = self._tokenize(submit)
        return Tokenized(self._incarnation, submit.rid, tokens, text)

    def _admit(self, gateway: bytes, submit: Submit, now: float) -> Request:
        self.check_room(submit)
        prepared, projection = self._slots.project(submit, self._prepare(submit))
        self._last_job += 1
        request = self._enter(self._last_job, gateway, submit, prepared, now, self._limits)
        request.projection = projection
        request.traceparent = submit.traceparent
        if projection.tokens < projection.prompt + projection.answer:
            request.grow_at = projection.tokens - projection.prompt
        return request

    def _end_whole(self, request: Request) -> None:
        """Answer a request with nothing left to generate."""
        prompt_tokens = len(request.job.prompt)
        self._send(request.gateway, Accepted(self._incarnation, request.rid, prompt_tokens))
        self._send(request.gateway, Step(self._incarnation, 0, [end_whole(request)]))
        event(
            "request_already_whole",
            trace=request.trace,
            rid=request.rid,
            completion_tokens=request.completion_tokens,
        )

    def _fill_slots(self, now: float) -> None:
        while (job := self._slots.take(self._waiting)) is not None:
            request = self._running[job] = self._waiting.pop(job)
            self._command(self._trim(request, now))
            prompt_tokens = len(request.job.prompt)
            self._send(request.gateway, Accepted(self._incarnation, request.rid, prompt_tokens))
            event(
                "request_accepted",
                trace=request.trace,
                rid=request.rid,
                prompt_tokens=prompt_tokens,
                resumed_tokens=len(request.job.said),
                max_tokens=request.job.max_tokens,
                waited_ms=round((now - request.received_at) * 1000),
                **traced(request.traceparent),
            )

    def _trim(self, request: Request, now: float) -> Job:
        """Return its job, which is not to wait for others that will have no slot, or came while it had none."""
        job = request.job
        coming = min(job.coming, self._slots.free) if request.received_at == now else 0
        return job if coming == job.coming else msgspec.structs.replace(job, coming=coming)

    def _expect(self, request: Request) -> None:
        at = request.deadline_at
        if request.job.id in self._waiting:
            at = min(at, request.slot_by)
        self.next_expiry = min(self.next_expiry, at)

    def _drop(self, jobs: Iterable[int], why: str, now: float) -> None:
        running = []
        for job in jobs:
            if job in self._running:
                running.append(job)
            request = self._running.get(job) or self._waiting[job]
            self._close(request, why, now)
        if running:
            self._command(Remove(running))
            self._fill_slots(now)

    def _end(self, job: int, error: LmxError, now: float, *, retryable: bool = False) -> None:
        """Tell the gateway that a request ends without its answer, and drop it."""
        request = self._running.get(job)
        if request is None:
            request = self._waiting[job]
            self._refuse(request.gateway, request.rid, error)
        else:
            failed = Failed(self._incarnation, request.rid, error.code, error.message, retryable)
            self._send(request.gateway, failed)
        self._drop([job], error.code, now)

    def _refuse(self, gateway: bytes, rid: int, error: LmxError) -> None:
        retry_after_s = error.retry_after_s
        refused = Refused(self._incarnation, rid, error.code, error.message, error.param, retry_after_s)
        self._send(gateway, refused)

    def _close(self, request: Request, why: str, now: float) -> None:
        job = request.job.id
        self._running.pop(job, None)
        self._waiting.pop(job, None)
        self._slots.drop(job)
        del self._jobs[request.key]
        event(
            "request_finished",
            trace=request.trace,
            rid=request.rid,
            reason=why,
            prompt_tokens=len(request.job.prompt),
            completion_tokens=request.completion_tokens,
            ms=round((now - request.received_at) * 1000),
            **traced(request.traceparent),
        )
        if request.span is not None:
            request.span.end(
                {
                    "gen_ai.usage.input_tokens": len(request.job.prompt),
                    "gen_ai.usage.output_tokens": request.completion_tokens,
                    "lmx.reason": why,
                },
                why if why in ERRORS else "",
            )


def tokenize_with(vocabulary: Vocabulary | None, submit: Submit) -> tuple[list[int], str]:
    """Return both sides of a request to tokenize; raise `LmxError`."""
    if vocabulary is None:
        raise LmxError("unsupported_parameter", "This model has no tokenizer to ask", param="model")
    return vocabulary.tokenize(submit)


def _timed_out() -> LmxError:
    return LmxError("timeout", f"{ERRORS['timeout'].title} the request set")
