"""What is counted while requests are answered: plain integers and lists, without locks and without looking up labels.

Owned by the event loop; `gateway.exposition` makes metrics of it when somebody asks.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from time import monotonic
from typing import Final

from gateway.requests import Request, RequestState

#: Upper ends of buckets, in seconds and tokens; those of vLLM, as far as they suit small machines.
TTFT_S: Final = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
GAP_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
WHOLE_S: Final = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKENS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
#: Models that are told apart; the catalog names them, so this is a bound on nonsense.
MAX_MODELS: Final = 1000
OTHER: Final = "other"


class Distribution:
    """How often values fell into which bucket. `bounds` are the upper ends, which belong to their buckets."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        #: One for each bound, and one for what is above them all.
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value, which was seen so often."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class ModelNumbers:
    """One model's requests: since this gateway began, in seconds and tokens."""

    def __init__(self) -> None:
        self.ttft = Distribution(TTFT_S)
        self.gap = Distribution(GAP_S)
        self.whole = Distribution(WHOLE_S)
        self.queue = Distribution(WHOLE_S)
        self.prefill = Distribution(WHOLE_S)
        self.decode = Distribution(WHOLE_S)
        self.prompt = Distribution(TOKENS)
        self.generation = Distribution(TOKENS)
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        #: Ends by OpenAI's reason or, for what failed, by the error's code.
        self.finished: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.cancelled = 0
        self.continued = 0

    def ended(self, request: Request, started: float) -> None:
        """Take note of one request of a call that began at `started` (`time.monotonic`), when it is over."""
        if request.error is not None:
            self.failed[request.error.code] += 1
        elif request.state is not RequestState.FINISHED:
            self.cancelled += 1
        else:
            self.finished["stop" if request.finish is None else request.finish.name.lower()] += 1
            self.whole.add(monotonic() - started)
        self.continued += request.crashes
        if request.accepted_at is not None:
            self.queue.add(request.accepted_at - started)
            self._timed(request, request.accepted_at, started)
        if request.tokens:
            self.generation_tokens += len(request.tokens)
            self.generation.add(len(request.tokens))

    def _timed(self, request: Request, accepted_at: float, started: float) -> None:
        first = request.first_text_at
        if first is not None:
            self.ttft.add(first - started)
            self.prefill.add(first - accepted_at)
            if request.state is RequestState.FINISHED:
                self.decode.add(monotonic() - first)

    def prompted(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Take note of one prompt."""
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens
        self.prompt.add(prompt_tokens)


class Numbers:
    """All of one gateway."""

    def __init__(self) -> None:
        self.models: dict[str, ModelNumbers] = {}
        #: Answers by route (as it is registered) and status; errors by code.
        self.answers: Counter[tuple[str, int]] = Counter()
        self.errors: Counter[str] = Counter()

    def of(self, model: str) -> ModelNumbers:
        """Return the numbers of a model of the catalog."""
        found = self.models.get(model)
        if found is None:
            if len(self.models) >= MAX_MODELS:
                model = OTHER
            found = self.models.setdefault(model, ModelNumbers())
        return found

    def answered(self, route: str, status: int, error: str) -> None:
        """Take note of an HTTP answer; `error` is the code of the one it was, or ended with."""
        self.answers[route, status] += 1
        if error:
            self.errors[error] += 1
