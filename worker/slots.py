"""Who may run at once: slots, the line for them, and the cache promised to who runs. Pure policy, IO thread only."""

from collections.abc import Mapping
from typing import Final

import msgspec

from protocol.data import Submit
from protocol.errors import LmxError
from worker.entry import Limits, Request, priority_of
from worker.jobs import Prepared
from worker.line import Line
from worker.room import STEP_TOKENS, Projection, Room

_MIB: Final = 1024**2


class Slots:
    """The places of one worker. `drop` gives back everything a request has, once, whatever that is."""

    def __init__(self, limits: Limits, room: Room) -> None:
        self._limits = limits
        self._room = room
        self._line = Line()
        self._limit = limits.slots
        #: Whether nothing has changed since nobody in line could have a slot.
        self._stuck = False
        #: Give no slots for a while.
        self.paused = False

    @property
    def limit(self) -> int:
        """Slots that may be taken now."""
        return self._limit

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        return max(0, self._limit - self._line.holding)

    @property
    def room(self) -> Room:
        """The cache that is promised."""
        return self._room

    def set_limit(self, slots: int) -> None:
        """Let so many run, 0 for all that are configured; who runs already goes on."""
        self._limit = min(slots, self._limits.slots) if slots > 0 else self._limits.slots
        self._stuck = False

    def unstick(self) -> None:
        """Something else has changed."""
        self._stuck = False

    def check(self, submit: Submit, coming: int) -> None:
        """Raise `server_busy` if there is no place left to wait; `coming` are being prepared and wait too.

        Before tokenizing: under a flood the cheapest answer is the one that has to be given most often.
        """
        if coming >= self._limits.slots + self._limits.queue_depth:
            raise self.busy("as many are being prepared")
        if len(self._line) + coming < self._limits.queue_depth + self.free:
            return
        if self._line.displaced_by(submit.client, priority_of(submit)) is None:
            raise self.busy("the queue is full")

    def project(self, submit: Submit, prepared: Prepared) -> tuple[Prepared, Projection]:
        """Return the request as it may run, and how much cache it is promised.

        Raises `request_too_large` for what would not fit alone. An answer whose length nobody asked for ends where the
        memory does, as it would at the end of the context.
        """
        prompt, answer = len(prepared.prompt), prepared.max_tokens
        open_ended = submit.sampling.max_tokens is None
        most = self._room.most_tokens
        if most is None or prompt + answer <= most:
            return prepared, Projection(prompt, answer, open_ended)
        if submit.resume is not None or (open_ended and prompt + min(answer, STEP_TOKENS) <= most):
            # A resumed one fitted where it began.
            answer = max(most - prompt, 1) if open_ended else answer
            prepared = msgspec.structs.replace(prepared, max_tokens=answer)
            return prepared, Projection(prompt, min(answer, max(0, most - prompt)), open_ended)
        raise self._too_large(prompt, answer, most, submit)

    def displace(self, request: Request) -> int | None:
        """Return who has to leave the line for this request, None while there is a place."""
        if len(self._line) < self._limits.queue_depth + self.free:
            return None
        return self._line.displaced_by(request.client, request.priority)

    def wait(self, request: Request) -> None:
        """Stand in line."""
        self._line.add(request.job.id, request.client, request.priority)
        self._stuck = False

    def take(self, waiting: Mapping[int, Request]) -> int | None:
        """Return the job that runs next, with its cache promised; None if none may now."""
        if self._stuck or self._line.holding >= self._limit or not self._line:
            return None
        job = None
        if not self.paused:
            job = self._line.take(lambda job: self._room.fits(waiting[job].projection.tokens))
        if job is None:
            self._stuck = True
        else:
            self._room.take(job, waiting[job].projection.tokens)
        return job

    def grow(self, request: Request) -> None:
        """Promise more to an answer that has become longer than was thought."""
        projection = request.projection
        longer = min(request.completion_tokens + STEP_TOKENS, projection.answer)
        request.grow_at = longer if longer < projection.answer else projection.answer + 1
        self._room.take(request.job.id, projection.prompt + longer)

    def drop(self, job: int) -> None:
        """Give back what it has: a place in line, a slot, the promise of a cache."""
        self._line.drop(job)
        self._room.release(job)
        self._stuck = False

    def busy(self, why: str) -> LmxError:
        """Return the refusal of a request that may come again."""
        depth = self._limits.queue_depth
        return LmxError(
            "server_busy", f"{self._limit} requests may run and up to {depth} may wait: {why}. Try again later."
        )

    def late(self, request: Request) -> LmxError:
        """Return the refusal of a request that has waited for long enough."""
        if self._line.holding < self._limit and not self._room.fits(request.projection.tokens):
            return self.busy("the memory for its cache did not come free in time")
        return self.busy("no slot came free in time")

    def _too_large(self, prompt: int, answer: int, most: int, submit: Submit) -> LmxError:
        need, budget = self._room.need(prompt + answer), self._room.budget
        shorter = prompt < most and submit.sampling.max_tokens is not None
        return LmxError(
            "request_too_large",
            f"A prompt of {prompt} tokens and up to {answer} of answer need {need / _MIB:.0f} MiB of cache, and this "
            f"model's process has {budget / _MIB:.0f} MiB, for {most} tokens. Send less or lower max_tokens; or raise "
            "memory.kv_tokens or memory.worker_limit_bytes on the server.",
            param="max_tokens" if shorter else "prompt" if submit.inputs else "messages",
        )
