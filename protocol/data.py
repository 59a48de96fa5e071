"""The data plane: what a gateway and one worker incarnation say to each other over ZeroMQ.

One frame is one message. Every message carries the incarnation it is meant for or comes from; a receiver drops and
counts what does not match. `rid` is a 64-bit number of the gateway, unique over its restarts; `trace` is the
client-visible request id, for logs only. All durations are seconds.
"""

from enum import IntEnum
from typing import Final

import msgspec

from protocol.messages import Decoder, Message

#: Largest frame either side accepts, in bytes. A request body is at most 16 MiB of JSON.
MAX_FRAME_BYTES: Final = 32 * 1024 * 1024
#: Messages queued per direction before a sender is told to wait (ZeroMQ high-water mark).
HIGH_WATER_MARK: Final = 4096


class Kind(IntEnum):
    """What a `Submit` asks for."""

    #: `messages` through the model's chat template.
    CHAT = 1
    #: `inputs` holds one prompt, text or tokens, taken as it is.
    COMPLETION = 2
    #: `inputs` holds texts or token lists; answered with one `Embedded`.
    EMBED = 3
    #: `inputs` holds a query and then documents; answered with one `Ranked`.
    RERANK = 4
    #: One text in `inputs`, or `messages`; answered with one `Tokenized`.
    TOKENIZE = 5
    #: One token list in `inputs`; answered with one `Tokenized`.
    DETOKENIZE = 6


class Finish(IntEnum):
    """Why a generation ended. The names are OpenAI's."""

    STOP = 1
    LENGTH = 2
    TOOL_CALLS = 3


class ToolCall(Message, frozen=True):
    """A call that an assistant made. `arguments` is JSON, as text."""

    id: str
    name: str
    arguments: str


class ChatMessage(Message, frozen=True):
    """One turn of a conversation, its content already reduced to text."""

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    #: What an assistant thought, `reasoning_content`.
    reasoning: str | None = None


class Sampling(Message, frozen=True):
    """How to choose tokens. `max_tokens` None means until the context is full.

    The defaults of what LMX adds to OpenAI's parameters switch them off: `top_k` 0, `min_p` 0, `repetition_penalty` 1.
    `logit_bias` is added to the logits of token ids. `logprobs` None asks for none, 0 for those of the chosen tokens,
    k for the k likeliest besides.
    """

    max_tokens: int | None = None
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    logprobs: int | None = None


class ToolChoice(IntEnum):
    """Whether the answer may, must or must not be a tool call."""

    NONE = 1
    AUTO = 2
    REQUIRED = 3
    #: The one that `ChatOptions.tool_name` names.
    NAMED = 4


class ChatOptions(Message, frozen=True):
    """What shapes a conversation's prompt and its answer. Every bytes field is JSON, empty if not given.

    `tools` is OpenAI's list of tool definitions; `json_schema` the schema that the answer must follow
    (`json_object` alone: any object); `template_args` an object, the variables for the chat template.
    `reasoning` None leaves it to the model whether it thinks before it answers.
    """

    tools: bytes = b""
    tool_choice: ToolChoice = ToolChoice.AUTO
    tool_name: str = ""
    parallel_tool_calls: bool = True
    json_object: bool = False
    json_schema: bytes = b""
    template_args: bytes = b""
    reasoning: bool | None = None
    reasoning_effort: str = ""
    #: Drop the oldest turns, but never a system message, until the prompt fits.
    truncate_oldest: bool = False


class Usage(Message, frozen=True):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class TopLogprob(Message, frozen=True):
    """One of the likeliest tokens of a position. `bytes` are its own, `token` the same as text."""

    token: str
    logprob: float
    bytes: bytes


class TokenLogprob(Message, frozen=True):
    """The natural logarithm of the probability that the model gave a token, before any sampling parameter.

    `logprob` is None for the first token of an echoed prompt, which nothing predicts.
    """

    token: str
    logprob: float | None
    bytes: bytes
    top: list[TopLogprob] = msgspec.field(default_factory=list)


class ToolDelta(Message, frozen=True):
    """A piece of the `index`-th tool call: `id` and `name` are set on its first piece, `arguments` is appended."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class Delta(Message, frozen=True):
    """What one request gained in one engine step, or in several. `finish` and `usage` are set on its last delta only.

    `text` is of the answer proper; `reasoning` what the model thought, `tool_calls` what it called. Within one delta
    the order is: reasoning, text, tool calls. With `Submit.echo` the first delta begins with the prompt.
    """

    rid: int
    text: str
    token_ids: list[int]
    finish: Finish | None = None
    usage: Usage | None = None
    reasoning: str = ""
    tool_calls: list[ToolDelta] = msgspec.field(default_factory=list)
    logprobs: list[TokenLogprob] = msgspec.field(default_factory=list)


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
    options: ChatOptions | None = None
    inputs: list[str | list[int]] = msgspec.field(default_factory=list)
    #: The answer begins with the prompt, and its logprobs with the prompt's.
    echo: bool = False
    #: The rid of the first of several requests with this very prompt, which may share its prefill; 0 for none.
    group: int = 0
    #: Length of the embeddings, 0 for the model's own.
    dimensions: int = 0
    #: W3C trace context of the call, "" if nobody traces it.
    traceparent: str = ""
    #: Requests with different ones share no cached prefix; never a key.
    salt: str = ""
    #: How many others the gateway has read already and is about to ask: those that come now may wait for them.
    coming: int = 0


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
    """All deltas for one gateway of one engine step, or of several together; `step` is the last of them."""

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


class Embedded(Message, frozen=True, tag=37):
    """The answer to `Kind.EMBED`: for each input its vector, normalised, as little-endian float32."""

    incarnation: int
    rid: int
    vectors: list[bytes]
    prompt_tokens: int


class Ranked(Message, frozen=True, tag=38):
    """The answer to `Kind.RERANK`: for each document, in the order given, how relevant it is."""

    incarnation: int
    rid: int
    scores: list[float]
    prompt_tokens: int


class Tokenized(Message, frozen=True, tag=39):
    """The answer to `Kind.TOKENIZE` and `Kind.DETOKENIZE`: both sides."""

    incarnation: int
    rid: int
    tokens: list[int]
    text: str


ToWorker = Submit | Abort
FromWorker = Accepted | Step | Refused | Failed | Embedded | Ranked | Tokenized


def to_worker_decoder() -> Decoder[ToWorker]:
    """Return a decoder for what a gateway sends."""
    return Decoder[ToWorker](ToWorker)


def from_worker_decoder() -> Decoder[FromWorker]:
    """Return a decoder for what a worker sends."""
    return Decoder[FromWorker](FromWorker)
