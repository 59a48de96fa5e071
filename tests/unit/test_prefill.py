"""Which prompts are processed side by side: the policy, and what real MLX makes of it."""

from pathlib import Path
from typing import Any

import pytest

from worker.batch import BatchBackend
from worker.jobs import Job
from worker.prefill import PromptTurns

CHUNK = 512


def never(_job: Job) -> bool:
    return False


def job(number: int, length: int, client: str = "", priority: int = 0, **more: Any) -> Job:
    return Job(number, [5 + number % 50] * length, 4, client=client, priority=priority, **more)


def started(turns: PromptTurns, *, answering: bool = True) -> list[int]:
    found = []
    while (one := turns.next(never, answering=answering)) is not None:
        found.append(one.id)
    return found


def paced(token_s: float) -> PromptTurns:
    """Of a model that processes a token of a prompt in so long."""
    turns = PromptTurns(CHUNK, 64)
    turns.add(job(999, 100))
    assert started(turns, answering=False) == [999]
    turns.chunk()
    turns.took(100 * token_s)
    turns.drop(999)
    return turns


def test_short_prompts_go_together_up_to_one_chunk() -> None:
    turns = PromptTurns(CHUNK, 8)
    for number in range(12):
        turns.add(job(number, 100))
    assert started(turns) == [0, 1, 2, 3, 4]
    assert turns.chunk() == CHUNK
    for number in range(5):
        turns.progress(number, 1)
    assert started(turns) == [5, 6, 7, 8, 9], "those whose last token is left are no hindrance"


def test_more_short_prompts_go_together_while_no_answer_would_wait_for_them() -> None:
    for answering, token_s, together in (
        (True, 0.00001, 5),
        (False, 0.00001, 20),
        (False, 0.0001, 10),
        (False, 0.01, 5),
    ):
        turns = paced(token_s)
        for number in range(30):
            turns.add(job(number, 100))
        assert len(started(turns, answering=answering)) == together
        assert turns.chunk() == CHUNK, "each of them goes in whole"


def test_the_first_prompts_go_together_as_if_the_model_were_large() -> None:
    turns = PromptTurns(CHUNK, 64)
    for number in range(30):
        turns.add(job(number, 100))
    assert len(started(turns, answering=False)) == 5


def test_what_a_step_took_while_answers_ran_tells_nothing_of_prompts() -> None:
    turns = paced(0.01)
    turns.add(job(0, 100))
    assert started(turns, answering=True) == [0]
    turns.chunk()
    turns.took(0.000001)
    turns.drop(0)
    for number in range(1, 30):
        turns.add(job(number, 100))
    assert len(started(turns, answering=False)) == 5


def test_long_prompts_do_not_go_together_though_no_answer_would_wait() -> None:
    turns = paced(0.00001)
    for number in range(30):
        turns.add(job(number, CHUNK // 4 + 1))
    assert len(started(turns, answering=False)) == 3


def test_no_more_prompts_at_once_than_there_are_places() -> None:
    turns = PromptTurns(CHUNK, 10)
    for number in range(12):
        turns.add(job(number, 10, client=str(number)))
    assert len(started(turns)) == 10
    assert turns.chunk() == CHUNK


def test_no_more_than_eight_prompts_share_a_chunk_that_is_too_short_for_them() -> None:
    turns = PromptTurns(CHUNK, 32)
    for number in range(12):
        turns.add(job(number, 100, client=str(number)))
    assert len(started(turns)) == 8
    assert turns.chunk() == CHUNK // 8


def test_one_long_prompt_of_each_client_at_a_time_and_they_share_the_chunk() -> None:
    turns = PromptTurns(CHUNK, 8)
    for number in range(10):
        turns.add(job(number, 6000, "greedy"))
    assert started(turns) == [0]
    assert turns.chunk() == CHUNK
    turns.add(job(20, 6000, "polite"))
    turns.add(job(21, 6000, "polite"))
    assert started(turns) == [20]
    assert turns.chunk() == CHUNK // 2
    turns.progress(0, 0)
    assert started(turns) == [1]
    turns.drop(20)
    assert started(turns) == [21]


def test_a_long_line_of_one_client_never_stops_the_others() -> None:
    turns = PromptTurns(CHUNK, 8)
    for number in range(50):
        turns.add(job(number, 6000, "greedy"))
    started(turns)
    for number in range(100, 130):
        turns.add(job(number, 20, f"client {number}"))
        assert started(turns) == [number]
        turns.progress(number, 0)


def test_whoever_is_dropped_is_forgotten() -> None:
    turns = PromptTurns(CHUNK, 8)
    for number in range(4):
        turns.add(job(number, 6000, "one"))
    started(turns)
    for number in (0, 2, 2, 99):
        turns.drop(number)
    assert started(turns) == [1]
    turns.progress(1, 0)
    assert started(turns) == [3]
    turns.drop(3)
    assert started(turns) == []
    assert turns.chunk() == CHUNK


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> tuple[Any, frozenset[int]]:
    from mlx_lm.utils import load_model

    model, config = load_model(tiny_model)
    return model, frozenset({config["eos_token_id"]})


@pytest.fixture
def backend(tiny: tuple[Any, frozenset[int]]) -> BatchBackend:
    model, eos = tiny
    return BatchBackend(model, eos, slots=32, prefill_tokens=64)


def prompt_tokens(backend: BatchBackend) -> int:
    return int(backend._generator._counters.prompt_tokens)


def test_between_two_decode_steps_one_chunk_of_all_prompts_is_processed(backend: BatchBackend) -> None:
    backend.insert(Job(0, [5, 6, 7], 400, logit_bias={1755: -100.0}))
    while not backend.step():
        pass
    for number in range(1, 13):
        backend.insert(job(number, 300, client=f"client {number % 3}"))
    answered: set[int] = set()
    while len(answered) < 12:
        before = prompt_tokens(backend)
        tokens = backend.step()
        assert prompt_tokens(backend) - before <= 64
        assert 0 in {one for one, _, _ in tokens}, "what runs gets a token in each step"
        answered |= {one for one, _, _ in tokens} - {0}


def test_prompts_that_come_together_get_their_first_tokens_together(backend: BatchBackend) -> None:
    backend._prompts._token_s = 0.00001
    for number in range(16):
        backend.insert(job(number, 10 + number % 6))
    firsts = []
    while not firsts:
        firsts = backend.step()
    assert sorted(one for one, _, _ in firsts) == list(range(16))
    backend.insert(job(99, 10))
    backend.remove(range(16))
    while not (rest := backend.step()):
        pass
    assert [one for one, _, _ in rest] == [99]
    backend.remove([99])


def test_a_polite_client_waits_for_no_more_than_its_share_beside_a_hundred_long_prompts(backend: BatchBackend) -> None:
    for number in range(100):
        backend.insert(job(number, 300, "greedy"))
    for _ in range(3):
        backend.step()
    backend.insert(job(200, 30, "polite"))
    steps = 0
    while 200 not in {one for one, _, _ in backend.step()}:
        steps += 1
        assert steps <= 4
    backend.remove(range(101))


def test_answers_are_the_same_whatever_prompts_were_processed_beside_them(tiny: tuple[Any, frozenset[int]]) -> None:
    model, eos = tiny
    alone = BatchBackend(model, eos, slots=8, prefill_tokens=64)
    jobs = [
        Job(number, [7 + number, *range(300, 310 + 37 * number)], 12, client=str(number % 2)) for number in range(6)
    ]
    expected = {one.id: alone.generate(one.prompt, 12) for one in jobs}
    together = BatchBackend(model, eos, slots=8, prefill_tokens=64)
    for one in jobs:
        together.insert(one)
    found: dict[int, list[int]] = {}
    while len(together):
        for number, token, _ in together.step():
            found.setdefault(number, []).append(token)
    assert found == expected
