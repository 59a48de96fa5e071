"""Real MLX, small arrays. The samplers are what decides an answer, so they are tested on distributions."""

import math
from typing import Any

import mlx.core as mx
import pytest

from worker.sampling import Samplers, SeededSampler, at_temperature, greedy, keep_top_p

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
    (row,) = at_temperature(logprobs(), 0.5, 0.72).tolist()
    assert [value > -math.inf for value in row] == [True, False, False, False, False]


def test_16_bit_logits_are_drawn_from_in_32_bits() -> None:
    assert at_temperature(logprobs().astype(mx.float16), 1.0, 0.5).dtype == mx.float32


def test_equal_parameters_share_one_sampler_object() -> None:
    samplers = Samplers()
    assert samplers.of(0.7, 0.9, None) is samplers.of(0.7, 0.9, None)
    assert samplers.of(0.7, 1.0, None) is samplers.of(0.7, 1.5, None)
    assert samplers.of(0.7, 0.9, None) is not samplers.of(0.8, 0.9, None)
    assert samplers.of(0.0, 0.9, 42) is samplers.of(0.0, 0.3, None) is greedy
    assert samplers.of(0.7, 0.9, 42) is not samplers.of(0.7, 0.9, 42)


def test_the_cache_is_bounded_and_forgets_the_least_used() -> None:
    samplers = Samplers()
    first = samplers.of(0.5, 1.0, None)
    for number in range(200):
        samplers.of(1 + number / 1000, 1.0, None)
        assert samplers.of(0.5, 1.0, None) is first
    assert len(samplers._cache) <= 64


def test_greedy_is_the_likeliest_token_of_each_row() -> None:
    assert greedy(logprobs(3)).tolist() == [0, 0, 0]


def test_a_seed_draws_the_same_tokens_each_time_and_another_seed_others() -> None:
    def draw(seed: int) -> list[int]:
        sampler = SeededSampler(1.0, 1.0, seed)
        return [sampler(logprobs()).item() for _ in range(40)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert len(set(draw(7))) > 1


def test_free_draws_in_between_do_not_change_a_seeded_sequence() -> None:
    free = Samplers().of(1.0, 1.0, None)
    alone, among = SeededSampler(1.0, 1.0, 3), SeededSampler(1.0, 1.0, 3)
    tokens = []
    for _ in range(20):
        free(logprobs(4)).tolist()
        tokens.append(among(logprobs()).item())
    assert tokens == [alone(logprobs()).item() for _ in range(20)]


@pytest.mark.parametrize("seed", [-1, 0, 2**63, 2**64 - 1, 2**70])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert SeededSampler(1.0, 1.0, seed)(logprobs()).shape == (1,)


def test_draws_follow_the_distribution() -> None:
    mx.random.seed(1)
    draws = Samplers().of(1.0, 1.0, None)(logprobs(4000)).tolist()
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
