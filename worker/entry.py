"""One request in the book, and how it is made of what a gateway sent."""

import hashlib
from typing import Final

import msgspec

from protocol.data import Submit
from protocol.tracing import Span
from worker.jobs import Answer, Job, Prepared
from worker.room import Projection

#: A deadline further away than this is this.
_MAX_DEADLINE_S: Final = 86_400.0
#: What began in a process that is gone was admitted there: it goes before all others.
RESUMED: Final = 1_000


class Limits(msgspec.Struct, frozen=True):
    """How much at once. `slot_timeout_s` is the longest wait for a slot, in seconds."""

    slots: int
    queue_depth: int
    slot_timeout_s: float


class Request(msgspec.Struct):
    """One request in the book. Times are of the caller's monotonic clock."""

    job: Job
    gateway: bytes
    rid: int
    trace: str
    answer: Answer
    received_at: float
    deadline_at: float
    slot_by: float
    #: Of the whole answer, also those that an earlier process generated.
    completion_tokens: int = 0
    #: What the first delta begins with.
    echo: str = ""
    #: Who asked, for turns: a key's id or an address.
    client: str = ""
    priority: int = 0
    projection: Projection = Projection(0, 0)
    #: The context of the trace it belongs to, and its own piece of that.
    traceparent: str = ""
    span: Span | None = None
    #: Completion tokens at which more cache has to be promised.
    grow_at: float = float("inf")

    @property
    def key(self) -> tuple[bytes, int]:
        """Rids are unique per gateway only."""
        return self.gateway, self.rid

    @property
    def whole(self) -> bool:
        """Whether nothing is left to do: of a resumed answer only the end had not reached the gateway, say."""
        return self.answer.stopped or (self.job.max_tokens < 1 and not self.job.scores_prompt)

    def take_echo(self) -> str:
        """Return the prompt if it is still to be said."""
        echo, self.echo = self.echo, ""
        return echo


def enter(job: int, gateway: bytes, submit: Submit, prepared: Prepared, now: float, limits: Limits) -> Request:
    """Return the request. What an earlier process said of it is put through its answer, and is not said again."""
    said = submit.resume.token_ids if submit.resume is not None else []
    for token in said:
        prepared.answer.add(token)
    sampling = submit.sampling
    return Request(
        job=Job(
            id=job,
            prompt=prepared.prompt,
            max_tokens=prepared.max_tokens - len(said),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            said=said,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias=sampling.logit_bias,
            logprobs=sampling.logprobs,
            echo=submit.echo and not said,
            constraint=prepared.constraint,
            group=_number_group(gateway, submit.group),
            client=submit.client,
            priority=priority_of(submit),
            salt=submit.salt,
            coming=submit.coming,
        ),
        gateway=gateway,
        rid=submit.rid,
        trace=submit.trace,
        answer=prepared.answer,
        received_at=now,
        deadline_at=now + min(submit.deadline_s, _MAX_DEADLINE_S),
        slot_by=now + limits.slot_timeout_s,
        completion_tokens=len(said),
        echo=prepared.echo if submit.echo and not said else "",
        client=submit.client,
        priority=priority_of(submit),
    )


def priority_of(submit: Submit) -> int:
    """Return the priority in line; higher goes first."""
    return submit.priority if submit.resume is None else RESUMED


def _number_group(gateway: bytes, rid: int) -> int:
    """Return a number for the group that this gateway names with a rid, which is unique per gateway only."""
    if not rid:
        return 0
    return int.from_bytes(hashlib.blake2b(b"%d " % rid + gateway, digest_size=8).digest()) | 1
