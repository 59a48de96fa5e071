"""The parameters that say how tokens are chosen, checked as OpenAI checks them."""

from typing import Final, NamedTuple

from gateway.decode import bad
from gateway.schemas import Generation
from protocol.config import GatewayConfig
from protocol.data import Sampling
from protocol.rules import MAX_STOP_CHARS, MAX_STOPS

MAX_CHOICES: Final = 16
MAX_LOGIT_BIAS: Final = 1024
#: No vocabulary is larger than a third of that.
MAX_TOP_K: Final = 1_000_000
#: Token ids are signed 32-bit numbers in MLX.
MAX_TOKEN_ID: Final = 2**31 - 1
_INT64: Final = 2**63
_MAX_ID_DIGITS: Final = 10


class Range(NamedTuple):
    """What a number may be."""

    low: float
    high: float
    default: float
    above_low: bool = False

    def words(self) -> str:
        """Return it in words."""
        if self.above_low:
            return f"must be above {self.low:g} and at most {self.high:g}"
        return f"must be between {self.low:g} and {self.high:g}"


TOP_P: Final = Range(0, 1, 1.0, above_low=True)
MIN_P: Final = Range(0, 1, 0.0)
PENALTY: Final = Range(-2, 2, 0.0)
REPETITION: Final = Range(0, 2, 1.0, above_low=True)
LOGIT_BIAS: Final = Range(-100, 100, 0.0)


def sampling(request: Generation, config: GatewayConfig, *, max_tokens: int | None, logprobs: int | None) -> Sampling:
    """Return what a request says about choosing tokens; raise `LmxError` that names the field."""
    if request.seed is not None and not -_INT64 <= request.seed < _INT64:
        raise bad("seed", "must fit into 64 bits")
    return Sampling(
        max_tokens=max_tokens,
        temperature=_in(request.temperature, "temperature", Range(0, 2, config.default_temperature)),
        top_p=_in(request.top_p, "top_p", TOP_P),
        seed=request.seed,
        stop=_stops(request.stop),
        top_k=_top_k(request.top_k),
        min_p=_in(request.min_p, "min_p", MIN_P),
        presence_penalty=_in(request.presence_penalty, "presence_penalty", PENALTY),
        frequency_penalty=_in(request.frequency_penalty, "frequency_penalty", PENALTY),
        repetition_penalty=_in(request.repetition_penalty, "repetition_penalty", REPETITION),
        logit_bias=_logit_bias(request.logit_bias),
        logprobs=logprobs,
    )


def choices(request: Generation) -> int:
    """Return how many answers are wanted."""
    return whole_number(request.n, "n", 1, MAX_CHOICES, 1)


def whole_number(value: int | None, name: str, low: int, high: int, default: int) -> int:
    """Return a number that lies within bounds."""
    if value is None:
        return default
    if not low <= value <= high:
        raise bad(name, f"must be between {low} and {high}")
    return value


def stream_usage(request: Generation) -> bool:
    """Return whether a stream ends with token counts."""
    options = request.stream_options
    if options is None:
        return False
    if not request.stream:
        raise bad("stream_options", "is only allowed with 'stream': true")
    return options.include_usage is True


def _in(value: float | None, name: str, bounds: Range) -> float:
    if value is None:
        return bounds.default
    if not bounds.low <= value <= bounds.high or (bounds.above_low and value == bounds.low):
        raise bad(name, bounds.words())
    return value


def _top_k(value: int | None) -> int:
    """Return 0, which switches it off, also for vLLM's -1."""
    return max(0, whole_number(value, "top_k", -1, MAX_TOP_K, 0))


def _logit_bias(given: dict[str, float] | None) -> dict[int, float]:
    if not given:
        return {}
    if len(given) > MAX_LOGIT_BIAS:
        raise bad("logit_bias", f"may hold at most {MAX_LOGIT_BIAS} tokens")
    found: dict[int, float] = {}
    for key, bias in given.items():
        known = key.isascii() and key.isdigit() and len(key) <= _MAX_ID_DIGITS and int(key) <= MAX_TOKEN_ID
        if not known:
            raise bad("logit_bias", 'must have token ids as its keys, such as "42"')
        found[int(key)] = _in(bias, "logit_bias", LOGIT_BIAS)
    return found


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise bad("stop", f"may hold at most {MAX_STOPS} strings")
    for index, text in enumerate(stops):
        name = "stop" if isinstance(stop, str) else f"stop[{index}]"
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise bad(name, f"must have 1 to {MAX_STOP_CHARS} characters")
    return stops
