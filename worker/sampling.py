"""How a token is chosen from logits, shaped so that a batch stays one operation where it can.

Everything here takes logits or log-probabilities alike: what a row's values have in common does not matter. Rows with
the same sampler *object* are drawn in one operation: requests with the same parameters therefore get the same object.
Nothing here is compiled: `mx.compile` keys on Python constants, so the samplers of mlx-lm are compiled anew for each
temperature a client thinks of (on Linux by a C++ compiler, with every stream waiting).
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import mlx.core as mx

#: Logits (rows, vocabulary) to token ids (rows,).
Sampler = Callable[[Any], Any]

#: Below this a temperature is 0: the division would only overflow to the same choice.
_GREEDY_BELOW: Final = 1e-5
_MIN_TOP_P: Final = 1e-6
_MAX_CACHED: Final = 64
_SEED_BITS: Final = 0xFFFF_FFFF_FFFF_FFFF


class Spread(NamedTuple):
    """Which tokens may be drawn and how likely: temperature first, then each of the others on what it left.

    `top_k` 0, `top_p` 1 and `min_p` 0 leave everything.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __call__(self, logits: Any) -> Any:
        """Return the log-weights (rows, vocabulary) to draw from, float32, those of dropped tokens -inf."""
        # float32: the cumulated mass of a large vocabulary is lost in 16 bits.
        scaled = logits.astype(mx.float32) * (1.0 / self.temperature)
        candidates = scaled
        if 0 < self.top_k < scaled.shape[-1]:
            candidates = mx.topk(scaled, self.top_k, axis=-1)
            scaled = _drop_below(scaled, candidates.min(axis=-1, keepdims=True))
        if self.top_p < 1.0:
            scaled = _drop_below(scaled, _least_of_top_p(candidates, self.top_p))
        if self.min_p > 0.0:
            scaled = _drop_below(scaled, scaled.max(axis=-1, keepdims=True) + math.log(min(self.min_p, 1.0)))
        return scaled


def greedy(logits: Any) -> Any:
    """Return the likeliest token of each row."""
    return mx.argmax(logits, axis=-1)


def keep_top_p(logits: Any, top_p: float) -> Any:
    """Return the logits with all but the likeliest tokens of total mass `top_p` at -inf.

    The token that crosses the limit is kept, so at least one is; tokens as likely as the last kept one are too.
    """
    return _drop_below(logits, _least_of_top_p(logits, top_p))


def _least_of_top_p(candidates: Any, top_p: float) -> Any:
    """Return the smallest logit (rows, 1) that is kept of these."""
    ordered = mx.sort(candidates, axis=-1)
    mass_above = mx.cumsum(mx.softmax(ordered, axis=-1), axis=-1, reverse=True, inclusive=False)
    dropped = (mass_above >= max(top_p, _MIN_TOP_P)).sum(axis=-1, keepdims=True)
    return mx.take_along_axis(ordered, dropped, axis=-1)


def _drop_below(logits: Any, least: Any) -> Any:
    return mx.where(logits < least, -float("inf"), logits)


class SeededSampler:
    """Draws each token with a key made of seed and position: the same seed gives the same tokens in any batch, and also
    when another process has drawn the first `position` of them.

    It belongs to one request, and is called once for each of its tokens.
    """

    def __init__(self, spread: Spread, seed: int, position: int = 0) -> None:
        self.spread = spread
        self._seed = seed
        self._position = position

    def next_key(self) -> Any:
        """Return the key of the next position."""
        self._position += 1
        return mx.random.key(_scramble(_scramble(self._seed) + self._position))

    def __call__(self, logits: Any) -> Any:
        """Draw one token from one row."""
        return draw_seeded([self], logits)


def draw_seeded(samplers: Sequence[SeededSampler], logits: Any) -> Any:
    """Draw one token for each row with the sampler of that row; all samplers have the same spread."""
    # The draw is Gumbel-max with noise made row by row: noise for several rows at once would depend on how many.
    noise = [mx.random.gumbel(logits.shape[-1:], key=sampler.next_key()) for sampler in samplers]
    return mx.argmax(samplers[0].spread(logits) + mx.stack(noise), axis=-1)


def _scramble(number: int) -> int:
    """Return 64 bits that differ in about half of them for two numbers that differ in one (splitmix64)."""
    number = (number + 0x9E37_79B9_7F4A_7C15) & _SEED_BITS
    number = ((number ^ (number >> 30)) * 0xBF58_476D_1CE4_E5B9) & _SEED_BITS
    number = ((number ^ (number >> 27)) * 0x94D0_49BB_1331_11EB) & _SEED_BITS
    return number ^ (number >> 31)


def _free_sampler(spread: Spread) -> Sampler:
    def draw(logits: Any) -> Any:
        return mx.random.categorical(spread(logits))

    return draw


class Samplers:
    """Gives each set of parameters one sampler object. Keeps the 64 used last."""

    def __init__(self) -> None:
        self._cache: OrderedDict[Spread, Sampler] = OrderedDict()

    def of(self, spread: Spread, seed: int | None, position: int = 0) -> Sampler:
        """Return the sampler for these parameters, from a position on; where only one token can be drawn, `greedy`."""
        if spread.temperature < _GREEDY_BELOW or spread.top_k == 1:
            return greedy
        spread = Spread(spread.temperature, min(spread.top_p, 1.0), max(spread.top_k, 0), max(spread.min_p, 0.0))
        if seed is not None:
            return SeededSampler(spread, seed, position)
        sampler = self._cache.pop(spread, None) or _free_sampler(spread)
        self._cache[spread] = sampler
        if len(self._cache) > _MAX_CACHED:
            self._cache.popitem(last=False)
        return sampler
