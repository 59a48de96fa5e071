"""Real MLX, small arrays. The samplers are what decides an answer, so they are tested on distributions."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from worker.sampling import Samplers, SeededSampler, Spread, draw_seeded, greedy, keep_top_p

PROBABILITIES = (0.5, 0.25, 0.125, 0.0625, 0.0625)


def logprobs(rows: int = 1) -> Any:
    return mx.log(mx.array([PROBABILITIES] * rows))


def kept(top_p: float) -> list[int]:
    (row,) = keep_top_p(logprobs(), top_p).tolist()
    return [index for index, value in enumerate(row) if value > -math.inf]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(1e-9, [0]), (0.4, [0]), (0.5, [0]), (0.51, [0, 1]), (0.75, [0, 1]), (0.8, [0, 1, 2]), (0.99, [0, 1, 2, 3, 4])],
)
def test_top_p_keeps_the_fewest_likeliest_tokens_of_that_mass(top_p: float, expected: list[int]) -> None:
    assert kept(top_p) == expected


def test_top_p_does_not_change_what_it_keeps() -> None:
    before, after = logprobs().tolist()[0], keep_top_p(logprobs(), 0.8).tolist()[0]
    assert after[:3] == before[:3]


def test_top_p_is_taken_after_temperature() -> None:
    # At temperature 0.5 the masses are squared and normalised: 0.727, 0.182, 0.045, …
    (row,) = Spread(0.5, 0.72)(logprobs()).tolist()
    assert [value > -math.inf for value in row] == [True, False, False, False, False]


def test_16_bit_logits_are_drawn_from_in_32_bits() -> None:
    assert Spread(1.0, 0.5)(logprobs().astype(mx.float16)).dtype == mx.float32


def reference(logits: list[float], spread: Spread) -> list[float]:
    """Return the probabilities to draw with, in float64, by the definitions: temperature, top-k, top-p, min-p."""
    scaled = [value / spread.temperature for value in logits]
    weights = [math.exp(value - max(scaled)) for value in scaled]
    if spread.top_k:
        least = sorted(weights, reverse=True)[: spread.top_k][-1]
        weights = [weight if weight >= least else 0.0 for weight in weights]
    total, mass, kept = sum(weights), 0.0, 0.0
    for weight in sorted(weights, reverse=True):
        kept = weight
        mass += weight / total
        if mass > spread.top_p:
            break
    weights = [weight if weight >= kept and weight >= spread.min_p * max(weights) else 0.0 for weight in weights]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("top_k", [0, 1, 3, 7, 40, 10**6])
@pytest.mark.parametrize("top_p", [0.05, 0.63, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.07, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_all_of_them_together_leave_what_their_definitions_say(
    temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    spread = Spread(temperature, top_p, top_k, min_p)
    random = np.random.default_rng(top_k)
    rows = (random.standard_normal((3, 40)) * 3).tolist()
    for row, kept in zip(rows, mx.softmax(spread(mx.array(rows)), axis=-1).tolist(), strict=True):
        assert kept == pytest.approx(reference(row, spread), abs=1e-5)


def test_what_a_constraint_forbids_is_never_drawn_whatever_the_parameters() -> None:
    row = mx.array([[-math.inf, 1.0, -math.inf, 0.5]])
    for spread in (Spread(1.0), Spread(1.0, 0.5), Spread(1.0, 0.99, 3), Spread(2.0, 1.0, 4, 0.01), Spread(1.0, 1.0, 3)):
        drawn = {SeededSampler(spread, seed)(row).item() for seed in range(20)}
        assert drawn <= {1, 3}


def test_equal_parameters_share_one_sampler_object() -> None:
    samplers = Samplers()
    assert samplers.of(Spread(0.7, 0.9), None) is samplers.of(Spread(0.7, 0.9), None)
    assert samplers.of(Spread(0.7, 1.0), None) is samplers.of(Spread(0.7, 1.5, -1, -0.5), None)
    assert samplers.of(Spread(0.7, 0.9), None) is not samplers.of(Spread(0.8, 0.9), None)
    assert samplers.of(Spread(0.7, 0.9, 5), None) is not samplers.of(Spread(0.7, 0.9, 6), None)
    assert samplers.of(Spread(0.7, 0.9, 0, 0.1), None) is not samplers.of(Spread(0.7, 0.9), None)
    assert samplers.of(Spread(0.0, 0.9), 42) is samplers.of(Spread(0.0, 0.3), None) is greedy
    assert samplers.of(Spread(1.5, top_k=1), 42) is greedy
    assert samplers.of(Spread(0.7, 0.9), 42) is not samplers.of(Spread(0.7, 0.9), 42)


def test_the_cache_is_bounded_and_forgets_the_least_used() -> None:
    samplers = Samplers()
    first = samplers.of(Spread(0.5), None)
    for number in range(200):
        samplers.of(Spread(1 + number / 1000), None)
        assert samplers.of(Spread(0.5), None) is first
    assert len(samplers._cache) <= 64


def test_greedy_is_the_likeliest_token_of_each_row() -> None:
    assert greedy(logprobs(3)).tolist() == [0, 0, 0]


def test_a_seed_draws_the_same_tokens_each_time_and_another_seed_others() -> None:
    def draw(seed: int) -> list[int]:
        sampler = SeededSampler(Spread(1.0), seed)
        return [sampler(logprobs()).item() for _ in range(40)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert len(set(draw(7))) > 1


def test_free_draws_in_between_do_not_change_a_seeded_sequence() -> None:
    free = Samplers().of(Spread(1.0), None)
    alone, among = SeededSampler(Spread(1.0), 3), SeededSampler(Spread(1.0), 3)
    tokens = []
    for _ in range(20):
        free(logprobs(4)).tolist()
        tokens.append(among(logprobs()).item())
    assert tokens == [alone(logprobs()).item() for _ in range(20)]


def test_rows_drawn_together_are_drawn_as_one_by_one() -> None:
    def new() -> list[SeededSampler]:
        return [SeededSampler(Spread(1.0, 0.9, 4), seed, seed) for seed in range(6)]

    together, alone = new(), new()
    for _ in range(10):
        assert draw_seeded(together, logprobs(6)).tolist() == [sampler(logprobs()).item() for sampler in alone]


def test_seeded_draws_follow_the_distribution() -> None:
    draws = draw_seeded([SeededSampler(Spread(1.0), seed) for seed in range(4000)], logprobs(4000)).tolist()
    assert abs(draws.count(0) / 4000 - 0.5) < 0.04
    assert abs(draws.count(1) / 4000 - 0.25) < 0.04


@pytest.mark.parametrize("seed", [-1, 0, 2**63, 2**64 - 1, 2**70])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert SeededSampler(Spread(1.0), seed)(logprobs()).shape == (1,)


def test_draws_follow_the_distribution() -> None:
    mx.random.seed(1)
    draws = Samplers().of(Spread(1.0), None)(logprobs(4000)).tolist()
    assert abs(draws.count(0) / 4000 - 0.5) < 0.04
    assert abs(draws.count(1) / 4000 - 0.25) < 0.04


def test_mlx_lm_never_sets_the_wired_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx_lm.generate  # noqa: F401

    from worker.batch import BatchBackend

    def forbidden(limit: int) -> int:
        raise AssertionError(limit)

    monkeypatch.setattr(mx, "set_wired_limit", forbidden)
    # A device with a recommendation, as every Mac is: what would set the limit without us.
    monkeypatch.setattr(mx, "device_info", lambda *_: {"max_recommended_working_set_size": 2**34})
    backend = BatchBackend(object(), {2}, slots=4, prefill_tokens=512)
    backend._generator.close()
