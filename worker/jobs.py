"""What crosses between the two threads of a worker: jobs and commands one way, tokens and events the other.

The main thread owns MLX (streams are thread-local there), the IO thread owns the sockets. Neither waits for the
other: both directions are queues, and `Status` is a handful of attributes that one side writes and the other reads.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import msgspec

from protocol.control import Capabilities
from protocol.data import Submit, TokenLogprob, ToolDelta
from protocol.errors import LmxError
from protocol.kvsize import KvShape
from protocol.states import Phase, WorkerExit

if TYPE_CHECKING:
    from worker.intake import Unready


class Constraint(Protocol):
    """Keeps one answer to a grammar. Called by the main thread only."""

    @property
    def failed(self) -> LmxError | None:
        """Why the grammar cannot be kept any further; it then allows the end alone. Read by the IO thread."""

    def __call__(self, said: Sequence[int], logits: Any) -> Any:
        """Return a row of logits (1, vocabulary) with every token that may not come after `said` at -inf."""


class Reused(msgspec.Struct):
    """How many tokens of a prompt came from a cache: written by the main thread before the first token of the answer,
    read by the IO thread with the last.
    """

    tokens: int = 0


class Job(msgspec.Struct, frozen=True, gc=False):
    """One generation as the engine sees it: tokens in, at most `max_tokens` out. `seed` None draws freely.

    `said` are tokens of the answer that an earlier process generated; `max_tokens` come behind them.
    """

    id: int
    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    said: list[int] = []
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    #: How many of the likeliest tokens to report for each token besides itself; None reports nothing.
    logprobs: int | None = None
    #: Whether the tokens of the prompt are reported too.
    echo: bool = False
    #: Called with the tokens of the answer so far and one row of logits, returns the row: a grammar at work.
    constraint: "Constraint | None" = None
    #: Jobs with the same number, not 0, have the same prompt and may share its prefill.
    group: int = 0
    #: Who asked, and how urgent it is: prompts are processed in turns.
    client: str = ""
    priority: int = 0
    #: Jobs with different ones have no cache in common.
    salt: str = ""
    #: How many others follow at once, as far as the gateway knows.
    coming: int = 0
    reused: Reused = msgspec.field(default_factory=Reused)

    @property
    def scores_prompt(self) -> bool:
        """Whether the tokens of the prompt are to be scored; only then may `max_tokens` be 0."""
        return self.echo and self.logprobs is not None


class EncodeJob(Job, frozen=True, gc=False):
    """Sequences for an encoder: `prompt` holds the tokens of all, one after another, and each ends at one of `ends`.

    `seconds` says for each from which of its own tokens on it is of the second text of a pair (its length: of none).
    """

    ends: list[int] = []
    seconds: list[int] = []
    #: Length of the vectors, 0 for the model's own.
    dimensions: int = 0
    #: The first sequence is a query; wanted is how near the others are to it.
    ranks: bool = False


class Remove(msgspec.Struct, frozen=True, gc=False):
    """Jobs that are no longer wanted; unknown ids are ignored."""

    jobs: list[int]


class End(msgspec.Struct, frozen=True, gc=False):
    """Leave the engine loop; the process exits with `code`."""

    code: WorkerExit
    message: str


class Relieve(msgspec.Struct, frozen=True, gc=False):
    """Give back the buffers that are kept for reuse, if they are more than `above_bytes`; with `caches` also what is
    kept of earlier prompts.
    """

    above_bytes: int = 0
    caches: bool = False


Command = Job | Remove | End | Relieve

#: The third part of a `Token`: the sequence goes on, met an end-of-sequence token, or reached its `max_tokens`.
GOES_ON: Final = 0
AT_STOP: Final = 1
AT_LENGTH: Final = 2

#: Job id, token id, and one of the three above. A plain tuple: thousands are made each second.
Token = tuple[int, int, int]

#: The token id of a job that ends without one: its prompt was to be scored, and nothing else.
NO_TOKEN: Final = -1


class Scored(NamedTuple):
    """A token and the natural logarithm of its probability as the model saw it; None where nothing came before it.

    `top` are the likeliest tokens of the position with theirs, likeliest first.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


Scores = Mapping[int, Sequence[Scored]]
NO_SCORES: Final[Scores] = MappingProxyType({})


class Stepped(NamedTuple):
    """The tokens of one engine step. `step` counts every step, also those that only processed prompts.

    `scores` has, by job, those of the jobs that asked: of the token, and before its first one those of the prompt.
    """

    step: int
    tokens: list[Token]
    scores: Scores = NO_SCORES


class Whole(NamedTuple):
    """The answer to one job: the vectors of its sequences as little-endian float32, or what their scores are."""

    job: int
    vectors: list[bytes]
    scores: list[float]


class Answered(NamedTuple):
    """The requests that one engine step completed, of a model that answers each in one piece."""

    step: int
    answers: list[Whole]


class LoadProgress(NamedTuple):
    """Bytes of weights in memory, of how many."""

    done_bytes: int
    total_bytes: int
    stage: str


class Warming(NamedTuple):
    """The weights are in memory and the canary is about to run."""


class Serving(NamedTuple):
    """The canary has passed."""

    loaded: "Loaded"
    load_s: float


class Finished(NamedTuple):
    """The main thread is done: say the last words, flush, end the IO thread."""

    code: WorkerExit
    message: str


class Readied(NamedTuple):
    """A request has been prepared by another thread."""

    unready: "Unready"


Event = Stepped | Answered | LoadProgress | Warming | Serving | Finished | Readied


class Backend(Protocol):
    """What the engine loop drives: `worker.batch` with MLX, `tests.fault` without. Called by the main thread only."""

    def __len__(self) -> int:
        """Return the number of jobs inserted and neither finished nor removed."""

    @property
    def prefilling(self) -> bool:
        """Whether the next step processes prompt tokens."""

    @property
    def scores(self) -> Scores:
        """What the last step's tokens were worth, for the jobs that asked: see `Stepped`."""

    def insert(self, job: Job) -> None:
        """Add a job to the batch."""

    def remove(self, jobs: Sequence[int]) -> None:
        """Take jobs out, at whatever stage they are; unknown ids are ignored."""

    def step(self) -> list[Token] | list[Whole]:
        """Run one decode step and one prefill chunk; return what was decoded, or the answers that it completed."""


class Said(NamedTuple):
    """What an answer gained, of each kind."""

    text: str = ""
    reasoning: str = ""
    tool_calls: Sequence[ToolDelta] = ()


NOTHING: Final = Said()


class Answer(Protocol):
    """Turns the tokens of one request into what may be shown. Called by the IO thread only."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met; nothing comes after it."""

    @property
    def called(self) -> bool:
        """Whether the answer is, or ends with, tool calls."""

    @property
    def failed(self) -> LmxError | None:
        """Why the answer cannot be gone on with, although it seems to end like any other."""

    def add(self, token: int) -> Said:
        """Return what is now certain."""

    def finish(self) -> Said:
        """Return what was held back, at the end of the generation."""


class Pace(IntEnum):
    """How long the preparing of a request takes, and by what."""

    #: So little that everyone else may wait for it.
    QUICK = 0
    #: Milliseconds for each thousand words.
    LONG_TEXT = 1
    #: Up to seconds for what was meant to.
    GRAMMAR = 2


class Prepared(msgspec.Struct, frozen=True):
    """A request that passed every check: its prompt as tokens, its limit, and the making of its text."""

    prompt: list[int]
    max_tokens: int
    answer: Answer
    constraint: Constraint | None = None
    #: The prompt as text, where the answer is to begin with it.
    echo: str = ""


class Vocabulary(Protocol):
    """What the IO thread asks a model's tokenizer besides prompts and answers."""

    def spell(self, scored: Scored) -> TokenLogprob:
        """Return a scored token in words."""

    def tokenize(self, submit: Submit) -> tuple[list[int], str]:
        """Answer `Kind.TOKENIZE` and `Kind.DETOKENIZE` with both sides; raise `protocol.errors.LmxError`."""


class Loaded(msgspec.Struct, frozen=True):
    """A model that is in memory."""

    backend: Backend
    capabilities: Capabilities
    #: Called by the IO thread and by those that `worker.intake` starts; raises `protocol.errors.LmxError`.
    prepare: Callable[[Submit], Prepared]
    #: Generates one token; whatever it raises ends the process.
    canary: Callable[[], None]
    #: Active, cached and peak bytes. Called by the IO thread.
    memory: Callable[[], tuple[int, int, int]]
    #: Gives back what the command says. Called by the main thread, like the two that follow.
    relieve: "Callable[[Relieve], None]" = lambda _command: None
    #: The engine has ended as asked: keeps what the next process can use.
    close: Callable[[], None] = lambda: None
    #: The engine has failed: drops what may be wrong.
    abandon: Callable[[], None] = lambda: None
    #: Whether each request is answered with one message, at its end.
    answers_whole: bool = False
    #: None where the model has no tokens to speak of.
    vocabulary: Vocabulary | None = None
    #: Returns the seconds per token of one request alone, 0 if it makes none. Called once, after the canary.
    time_step: Callable[[], float] = lambda: 0.0
    #: How long `prepare` will take. Called by the IO thread.
    pace: Callable[[Submit], Pace] = lambda _: Pace.QUICK
    #: What one sequence keeps in memory; nothing where nothing is kept between two steps.
    cache: KvShape = KvShape()


class Status:
    """Written by the main thread, read by the IO thread; each attribute is one atomic store in CPython."""

    __slots__ = ("phase", "step", "step_at")

    def __init__(self) -> None:
        self.phase = Phase.LOADING
        self.step = 0
        self.step_at = time.monotonic()
