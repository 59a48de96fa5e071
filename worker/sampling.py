"""How a token is chosen from log-probabilities, shaped so that a batch stays one operation where it can.

mlx-lm calls the sampler once for the whole batch when all sequences share one *object*, and row by row otherwise:
requests with the same parameters therefore get the same object. Nothing here is compiled: `mx.compile` keys on
Python constants, so the samplers of mlx-lm are compiled anew for each temperature a client thinks of (on Linux by a
C++ compiler, with every stream waiting).
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

import mlx.core as mx

#: Log-probabilities (rows, vocabulary) to token ids (rows,).
Sampler = Callable[[Any], Any]

#: Below this a temperature is 0: the division would only overflow to the same choice.
_GREEDY_BELOW: Final = 1e-5
_MIN_TOP_P: Final = 1e-6
_MAX_CACHED: Final = 64
_SEED_BITS: Final = 0xFFFF_FFFF_FFFF_FFFF


def greedy(logprobs: Any) -> Any:
    """Return the likeliest token of each row."""
    return mx.argmax(logprobs, axis=-1)


def keep_top_p(logprobs: Any, top_p: float) -> Any:
    """Return normalised log-probabilities with all but the likeliest tokens of total mass `top_p` at -inf.

    The token that crosses the limit is kept, so at least one is; tokens as likely as the last kept one are too.
    """
    ordered = mx.sort(logprobs, axis=-1)
    probabilities = mx.exp(ordered)
    mass_above = mx.cumsum(probabilities, axis=-1, reverse=True, inclusive=False)
    dropped = (mass_above >= max(top_p, _MIN_TOP_P)).sum(axis=-1, keepdims=True)
    return mx.where(logprobs < mx.take_along_axis(ordered, dropped, axis=-1), -float("inf"), logprobs)


def at_temperature(logprobs: Any, temperature: float, top_p: float) -> Any:
    """Return the log-weights to draw from: temperature first, then top-p of what results, as clients expect."""
    # float32: the cumulated mass of a large vocabulary is lost in 16 bits.
    scaled = logprobs.astype(mx.float32) * (1.0 / temperature)
    if top_p >= 1.0:
        return scaled
    return keep_top_p(scaled - mx.logsumexp(scaled, axis=-1, keepdims=True), top_p)


class SeededSampler:
    """Draws each token with a key made of seed and position: the same seed gives the same tokens in any batch, and also
    when another process has drawn the first `position` of them.

    It belongs to one request. mlx-lm calls it with one row at a time because no other row shares it.
    """

    def __init__(self, temperature: float, top_p: float, seed: int, position: int = 0) -> None:
        self._temperature = temperature
        self._top_p = top_p
        self._seed = seed
        self._position = position

    def __call__(self, logprobs: Any) -> Any:
        """Draw one token."""
        self._position += 1
        key = mx.random.key(_scramble(_scramble(self._seed) + self._position))
        return mx.random.categorical(at_temperature(logprobs, self._temperature, self._top_p), key=key)


def _scramble(number: int) -> int:
    """Return 64 bits that differ in about half of them for two numbers that differ in one (splitmix64)."""
    number = (number + 0x9E37_79B9_7F4A_7C15) & _SEED_BITS
    number = ((number ^ (number >> 30)) * 0xBF58_476D_1CE4_E5B9) & _SEED_BITS
    number = ((number ^ (number >> 27)) * 0x94D0_49BB_1331_11EB) & _SEED_BITS
    return number ^ (number >> 31)


def _free_sampler(temperature: float, top_p: float) -> Sampler:
    def draw(logprobs: Any) -> Any:
        return mx.random.categorical(at_temperature(logprobs, temperature, top_p))

    return draw


class Samplers:
    """Gives each set of parameters one sampler object. Keeps the 64 used last."""

    def __init__(self) -> None:
        self._cache: OrderedDict[tuple[float, float], Sampler] = OrderedDict()

    def of(self, temperature: float, top_p: float, seed: int | None, position: int = 0) -> Sampler:
        """Return the sampler for these parameters, from a position on; at temperature 0 always the same greedy one."""
        if temperature < _GREEDY_BELOW:
            return greedy
        if seed is not None:
            return SeededSampler(temperature, top_p, seed, position)
        key = (temperature, min(top_p, 1.0))
        sampler = self._cache.pop(key, None) or _free_sampler(*key)
        self._cache[key] = sampler
        if len(self._cache) > _MAX_CACHED:
            self._cache.popitem(last=False)
        return sampler
