"""Requests for embeddings take turns within a budget of tokens, and little of a batch is padding."""

from hypothesis import given
from hypothesis import strategies as st

from worker.embedding_turns import Piece, Turns, buckets

LENGTHS = st.lists(st.integers(1, 512), min_size=1, max_size=40)


@given(jobs=st.lists(LENGTHS, min_size=1, max_size=8), budget=st.integers(1, 2048))
def test_every_sequence_is_taken_once_and_a_step_keeps_to_its_budget(jobs: list[list[int]], budget: int) -> None:
    turns = Turns()
    for job, lengths in enumerate(jobs):
        turns.add(job, lengths)
    taken: list[Piece] = []
    while step := turns.take(budget):
        assert len(step) == 1 or sum(piece.length for piece in step) <= budget
        taken += step
    assert sorted(taken) == [
        Piece(job, number, length) for job, lengths in enumerate(jobs) for number, length in enumerate(lengths)
    ]


@given(LENGTHS)
def test_buckets_hold_everything_and_waste_at_most_a_quarter(lengths: list[int]) -> None:
    pieces = [Piece(0, number, length) for number, length in enumerate(lengths)]
    made = list(buckets(pieces))
    assert sorted(piece for bucket in made for piece in bucket) == sorted(pieces)
    for bucket in made:
        assert all(bucket[0].length * 0.75 <= piece.length <= bucket[0].length for piece in bucket)


def test_a_newcomer_has_its_turn_in_the_next_step() -> None:
    turns = Turns()
    turns.add(1, [10] * 1000)
    turns.take(100)
    turns.add(2, [10])
    assert any(piece.job == 2 for piece in turns.take(100))


def test_many_requests_share_a_step_evenly_and_the_turn_moves_on() -> None:
    turns = Turns()
    for job in range(5):
        turns.add(job, [10] * 100)
    counts = [0] * 5
    for _ in range(20):
        for piece in turns.take(30):
            counts[piece.job] += 1
    assert counts == [12] * 5


def test_what_is_dropped_is_not_taken() -> None:
    turns = Turns()
    turns.add(1, [5, 5])
    turns.add(2, [5])
    turns.drop(1)
    turns.drop(99)
    assert turns.take(100) == [Piece(2, 0, 5)]
    assert turns.take(100) == []


def test_a_sequence_above_the_budget_is_taken_alone() -> None:
    turns = Turns()
    turns.add(1, [500, 10])
    assert turns.take(16) == [Piece(1, 0, 500)]
    assert turns.take(16) == [Piece(1, 1, 10)]
