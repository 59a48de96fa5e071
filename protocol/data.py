"""The data plane: what a gateway and one worker incarnation say to each other over ZeroMQ.

One frame is one message. Every message carries the incarnation it is meant for or comes from; a receiver drops and
counts what does not match. `rid` is a 64-bit number of the gateway, unique over its restarts; `trace` is the
client-visible request id, for logs only. All durations are seconds.
"""

from enum import IntEnum
from typing import Final

from protocol.messages import Decoder, Message

#: Largest frame either side accepts, in bytes. A request body is at most 16 MiB of JSON.
MAX_FRAME_BYTES: Final = 32 * 1024 * 1024
#: Messages queued per direction before a sender is told to wait (ZeroMQ high-water mark).
HIGH_WATER_MARK: Final = 4096


class Kind(IntEnum):
    """What a `Submit` asks for."""

    CHAT = 1


class Finish(IntEnum):
    """Why a generation ended. The names are OpenAI's."""

    STOP = 1
    LENGTH = 2


class ChatMessage(Message, frozen=True):
    """One turn of a conversation, its content already reduced to text."""

    role: str
    content: str
    name: str | None = None


class Sampling(Message, frozen=True):
    """How to choose tokens. `max_tokens` None means until the context is full."""

    max_tokens: int | None = None
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class Usage(Message, frozen=True):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Delta(Message, frozen=True):
    """What one request gained in one engine step. `finish` and `usage` are set on its last delta only."""

    rid: int
    text: str
    token_ids: list[int]
    finish: Finish | None = None
    usage: Usage | None = None


class Resume(Message, frozen=True):
    """What a request had already been answered with when its last process ended.

    The worker goes on behind these tokens and sends only what comes after the text they stand for; usage counts them.
    """

    token_ids: list[int]


# -- gateway to worker ------------------------------------------------------------------------------------------


class Submit(Message, frozen=True, tag=1):
    """A request. `deadline_s` counts from receipt; `client` identifies the caller for fairness."""

    incarnation: int
    rid: int
    kind: Kind
    messages: list[ChatMessage]
    sampling: Sampling
    deadline_s: float
    trace: str = ""
    client: str = ""
    priority: int = 0
    resume: Resume | None = None


class Abort(Message, frozen=True, tag=2):
    """The named requests are no longer wanted. Unknown ids are ignored."""

    incarnation: int
    rids: list[int]


# -- worker to gateway ------------------------------------------------------------------------------------------


class Accepted(Message, frozen=True, tag=33):
    """The request holds a slot or a place in the bounded queue; nothing of it has been generated yet."""

    incarnation: int
    rid: int
    prompt_tokens: int
    cached_tokens: int = 0


class Step(Message, frozen=True, tag=34):
    """All deltas of one engine step for one gateway."""

    incarnation: int
    step: int
    deltas: list[Delta]


class Refused(Message, frozen=True, tag=35):
    """The request was not accepted. `code` is a code of `protocol.errors`."""

    incarnation: int
    rid: int
    code: str
    message: str
    param: str | None = None
    retry_after_s: int | None = None


class Failed(Message, frozen=True, tag=36):
    """An accepted request ended without its answer."""

    incarnation: int
    rid: int
    code: str
    message: str
    retryable: bool = False


ToWorker = Submit | Abort
FromWorker = Accepted | Step | Refused | Failed


def to_worker_decoder() -> Decoder[ToWorker]:
    """Return a decoder for what a gateway sends."""
    return Decoder[ToWorker](ToWorker)


def from_worker_decoder() -> Decoder[FromWorker]:
    """Return a decoder for what a worker sends."""
    return Decoder[FromWorker](FromWorker)
