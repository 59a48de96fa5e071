"""Who runs after a crash, and whose fault the next one is."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.probation import PAST_TOKENS, Probation
from gateway.quarantine import Quarantine


def test_an_idle_crash_names_nobody_and_stops_nobody() -> None:
    probation = Probation()
    assert probation.crashed({}) == set()
    assert not probation.active


def test_suspects_are_tried_one_at_a_time_those_with_the_fewest_tokens_first() -> None:
    probation = Probation()
    assert probation.crashed({1: 50, 2: 0, 3: 7}) == {1, 2, 3}
    order = []
    while probation.active:
        rid = probation.next()
        assert rid is not None
        mark = probation.begin(rid)
        order.append((rid, mark))
        assert probation.next() is None  # one at a time
        assert probation.forget(rid)
    assert order == [(2, PAST_TOKENS), (3, 7 + PAST_TOKENS), (1, 50 + PAST_TOKENS)]


def test_a_crash_during_a_trial_names_the_one_on_trial_alone() -> None:
    probation = Probation()
    probation.crashed({1: 1, 2: 2, 3: 3})
    probation.begin(1)
    probation.forget(1)
    probation.begin(2)
    assert probation.crashed({1: 30, 2: 2}) == {2}
    assert probation.on_trial is None
    assert probation.next() == 2
    probation.forget(2)
    assert probation.next() == 3  # of the first crash, and still to be tried


def test_a_trial_that_was_interrupted_is_held_again() -> None:
    probation = Probation()
    probation.crashed({1: 1})
    probation.begin(1)
    probation.interrupt(1)
    assert probation.next() == 1


def test_someone_on_trial_who_was_not_running_is_not_blamed() -> None:
    probation = Probation()
    probation.crashed({1: 1, 2: 2})
    probation.begin(1)
    probation.forget(1)
    probation.begin(2)
    assert probation.crashed({1: 40}) == {1}
    probation.interrupt(2)
    assert probation.next() == 2


class World:
    """Requests that run to 40 tokens on a model that some of them kill at a token of their own."""

    def __init__(self, seed: int, requests: int, poisons: dict[int, int], lost: int) -> None:
        self.rng = random.Random(seed)
        self.poisons = poisons
        self.lost = lost
        self.probation = Probation()
        self.quarantine = Quarantine(2, 600)
        self.tokens = dict.fromkeys(range(requests), 0)
        self.running: set[int] = set()
        self.waiting = set(self.tokens)
        self.marks: dict[int, int] = {}
        self.finished: set[int] = set()
        self.refused: set[int] = set()
        self.crashes = 0
        self.blamed = dict.fromkeys(self.tokens, 0)

    def start(self) -> None:
        if not self.probation.active:
            self.running |= self.waiting
            self.waiting = set()
            return
        rid = self.probation.next()
        if rid is not None:
            self.marks[rid] = self.probation.begin(rid)
            self.waiting.discard(rid)
            self.running.add(rid)

    def step(self) -> None:
        self.start()
        assert self.running, "nobody runs and somebody waits"
        killers = [rid for rid in self.running if self.tokens[rid] == self.poisons.get(rid)]
        if killers:
            self.crash()
            return
        for rid in list(self.running):
            self.tokens[rid] += 1
            if self.tokens[rid] >= self.marks.get(rid, 10**9):
                del self.marks[rid]
                self.probation.forget(rid)
            if self.tokens[rid] == 40:
                self.finished.add(rid)
                self.running.discard(rid)
                self.probation.forget(rid)
                self.quarantine.acquit(bytes([rid]), float(self.crashes))

    def crash(self) -> None:
        """The gateway may have fewer tokens than were generated."""
        self.crashes += 1
        for rid in self.running:
            self.tokens[rid] = max(0, self.tokens[rid] - self.rng.randint(0, self.lost))
        suspects = self.probation.crashed({rid: self.tokens[rid] for rid in self.running})
        for rid in suspects:
            self.blamed[rid] += 1
            if self.quarantine.name(bytes([rid]), float(self.crashes)):
                self.refused.add(rid)
                self.running.discard(rid)
                self.probation.forget(rid)
        self.waiting |= self.running
        self.running, self.marks = set(), {}


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    requests=st.integers(1, 12),
    poison=st.dictionaries(st.integers(0, 11), st.integers(0, 39), max_size=1),
    lost=st.integers(0, PAST_TOKENS - 2),
)
def test_one_poison_makes_two_crashes_and_everybody_else_finishes(
    seed: int, requests: int, poison: dict[int, int], lost: int
) -> None:
    world = World(seed, requests, poison, lost)
    for _ in range(10_000):
        if len(world.finished) + len(world.refused) == requests:
            break
        world.step()
    there = {rid for rid in poison if rid < requests}
    assert world.refused == there
    assert world.finished == set(range(requests)) - there
    assert world.crashes == 2 * len(there)
    assert all(world.blamed[rid] <= 1 for rid in world.finished)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    requests=st.integers(1, 12),
    poisons=st.dictionaries(st.integers(0, 11), st.integers(0, 3), max_size=4),
)
def test_several_poisons_are_found_one_by_one_and_it_always_ends(
    seed: int, requests: int, poisons: dict[int, int]
) -> None:
    world = World(seed, requests, poisons, 0)
    for _ in range(10_000):
        if len(world.finished) + len(world.refused) == requests:
            break
        world.step()
    there = {rid for rid in poisons if rid < requests}
    assert world.refused == there
    assert world.finished == set(range(requests)) - there
    assert world.crashes <= 1 + len(there)
