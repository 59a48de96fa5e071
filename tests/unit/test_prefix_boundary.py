"""Prefixes of models with sliding windows and recurrent layers: whole states, used exactly where they were taken."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.cachekit import recurrent, windowed
from worker import prefix_boundary
from worker.batch import BatchBackend
from worker.jobs import Job
from worker.prefix_boundary import Boundaries, can_keep_states
from worker.prefix_kv import probe

PREFILL = 48
LIMIT = 64 * 1024 * 1024


@pytest.fixture(scope="module", params=[windowed, recurrent])
def model(request: pytest.FixtureRequest) -> Any:
    mx.random.seed(7)
    made = request.param()
    # Random weights of a larger spread than the initial ones: else every prompt has the same answer.
    made.update(tree(lambda array: mx.random.normal(array.shape) * 0.3, made.parameters()))
    mx.eval(made.parameters())
    assert probe(made) is None
    assert can_keep_states(made)
    return made


def tree(change: Callable[[Any], Any], parameters: Any) -> Any:
    from mlx.utils import tree_map

    return tree_map(change, parameters)


def words(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 510, length).tolist()  # type: ignore[no-any-return]


def backend(model: Any, prefixes: Boundaries | None = None) -> BatchBackend:
    return BatchBackend(model, [], slots=8, prefill_tokens=PREFILL, prefixes=prefixes)


def run(on: BatchBackend, *jobs: Job) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {job.id: [] for job in jobs}
    for job in jobs:
        on.insert(job)
    while len(on):
        for job_id, token, _ in on.step():
            tokens[job_id].append(token)
    return tokens


def one(on: BatchBackend, prompt: list[int], **fields: Any) -> tuple[list[int], int]:
    job = Job(1, prompt, 12, **fields)
    return run(on, job)[1], job.reused.tokens


def test_a_prompt_and_what_continues_it_go_on_from_its_end(model: Any) -> None:
    prompt = words(200)
    on = backend(model, Boundaries(LIMIT))
    answer, none = one(on, prompt)
    assert (answer, none) == one(backend(model), prompt)
    assert one(on, prompt) == (answer, 199)
    following = prompt + answer + words(20, seed=1)
    assert one(on, following) == (one(backend(model), following)[0], 199)
    # Not a token less than it was taken at: that state knows nothing of the positions before.
    assert one(on, prompt[:150])[1] == 0


def test_where_two_prompts_part_a_state_is_kept_for_the_third(model: Any) -> None:
    system = words(150)
    on = backend(model, Boundaries(LIMIT))
    found = []
    for seed in range(4):
        prompt = system + words(40 + seed, seed=10 + seed)
        answer, reused = one(on, prompt)
        assert answer == one(backend(model), prompt)[0]
        found.append(reused)
    assert found[:2] == [0, 0]
    assert found[2:] == [150, 150]


def test_a_batch_of_mixed_lengths_says_the_same_with_it(model: Any) -> None:
    system = words(100)
    prompts = [system + words(9 * number, seed=number) for number in range(1, 6)] + [words(70, seed=50)]
    expected = {number: one(backend(model), prompt)[0] for number, prompt in enumerate(prompts)}
    on = backend(model, Boundaries(LIMIT))
    for _ in range(3):
        jobs = [Job(number, prompt, 12) for number, prompt in enumerate(prompts)]
        assert run(on, *jobs) == expected
    assert all(job.reused.tokens == len(job.prompt) - 1 for job in jobs)


def test_choices_of_one_prompt_and_other_salts(model: Any) -> None:
    prompt = words(120)
    on = backend(model, Boundaries(LIMIT))
    expected, _ = one(on, prompt, salt="key:a")
    assert one(on, prompt, salt="key:b") == (expected, 0)
    for _ in range(2):
        jobs = [Job(number, prompt, 12, group=3, salt="key:a") for number in range(1, 4)]
        assert run(on, *jobs) == dict.fromkeys(range(1, 4), expected)


def test_bounds_hold_and_everything_can_be_given_back(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Boundaries(LIMIT)
    one(backend(model, whole), words(200))
    each, spare = whole.bytes, 10**9
    assert each > 0
    states = Boundaries(3 * each, spare=lambda: spare)
    on = backend(model, states)
    for seed in range(6):
        one(on, words(200, seed=seed))
        assert states.bytes <= 3 * each
    assert one(on, words(200, seed=5))[1] == 199, "the last ones are there"
    assert one(on, words(200, seed=0))[1] == 0, "the first is not"
    assert states.drop_unused() == 0
    spare = -(10**9)
    one(on, words(100, seed=9))
    assert states.bytes == 0
    spare = 10**9
    monkeypatch.setattr(prefix_boundary, "_MAX_STATES", 2)
    for seed in range(4):
        one(on, words(80, seed=seed))
        assert len(states._states) <= 2
    assert states.clear() > 0
    assert states.bytes == 0


def test_a_state_is_no_view_of_the_batch(model: Any) -> None:
    """A view would keep the caches of the whole batch in memory, uncounted."""
    states = Boundaries(LIMIT)
    on = backend(model, states)
    # Side by side, and one after the other at its end: the first state would keep eight of them, the second seven.
    jobs = [Job(number, words(400 - 20 * number, seed=number), 1, client=str(number)) for number in range(8)]
    before = mx.get_active_memory()
    run(on, *jobs)
    assert len(states._states) == 8
    assert mx.get_active_memory() - before <= states.bytes * 1.1 + 50_000


def test_a_state_of_another_length_than_it_says_is_dropped(model: Any) -> None:
    prompt = words(100)
    states = Boundaries(LIMIT)
    on = backend(model, states)
    expected, _ = one(on, prompt)
    (state,) = states._states.values()
    counting = next(layer for layer in state.layers if hasattr(layer, "offset"))
    counting.offset += 1
    assert one(on, prompt) == (expected, 0)
    assert states.stats.rejected == 1
    assert one(on, prompt) == (expected, 99)
