"""Requests that are answered with one message at their end: embeddings and rankings. IO thread only."""

import msgspec

from protocol.data import Embedded, Ranked, Submit
from worker.entry import Limits, Request, enter
from worker.jobs import NOTHING, Answered, EncodeJob, Prepared, Said
from worker.requests import Book


class NoText:
    """`worker.jobs.Answer` of a request that has no text."""

    stopped = False
    called = False
    failed = None

    def add(self, _token: int) -> Said:
        """There are no tokens."""
        return NOTHING

    def finish(self) -> Said:
        """Nothing was held back."""
        return NOTHING


class PreparedEncode(Prepared, frozen=True):
    """A request for an encoder that passed every check; the fields are those of `worker.jobs.EncodeJob`."""

    ends: list[int] = msgspec.field(default_factory=list)
    seconds: list[int] = msgspec.field(default_factory=list)
    dimensions: int = 0
    ranks: bool = False


def enter_encode(job: int, gateway: bytes, submit: Submit, prepared: Prepared, now: float, limits: Limits) -> Request:
    """Return the request."""
    assert isinstance(prepared, PreparedEncode), "an encoder's inputs are prepared by worker.embedding_inputs"
    request = enter(job, gateway, submit, prepared, now, limits)
    request.job = EncodeJob(
        id=job,
        prompt=prepared.prompt,
        max_tokens=1,
        ends=prepared.ends,
        seconds=prepared.seconds,
        dimensions=prepared.dimensions,
        ranks=prepared.ranks,
    )
    return request


class WholeBook(Book):
    """The book of a model that answers each request in one piece."""

    _enter = staticmethod(enter_encode)

    def on_answers(self, answered: Answered, now: float) -> None:
        """Send the answers that one engine step completed."""
        for answer in answered.answers:
            request = self._running.get(answer.job)
            if request is None:  # removed while this step ran
                continue
            tokens = len(request.job.prompt)
            if answer.scores:
                reply: Embedded | Ranked = Ranked(self._incarnation, request.rid, answer.scores, tokens)
            else:
                reply = Embedded(self._incarnation, request.rid, answer.vectors, tokens)
            self._close(request, "answered", now)
            self._send(request.gateway, reply)
        if self._waiting:
            self._fill_slots(now)
