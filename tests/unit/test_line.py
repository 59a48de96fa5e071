"""Turns: between clients, between priorities, and for what needs more room than others."""

import random
from collections import Counter

from worker.line import PATIENCE, Line


def always(_job: int) -> bool:
    return True


def stand(line: Line, client: str, jobs: range, priority: int = 0) -> None:
    for job in jobs:
        line.add(job, client, priority)


def serve(line: Line, count: int) -> list[int]:
    """Return the jobs that get a single place one after another."""
    served = []
    for _ in range(count):
        job = line.take(always)
        if job is None:
            break
        served.append(job)
        line.drop(job)
    return served


def test_a_hundred_requests_of_one_client_delay_another_by_one_turn() -> None:
    line = Line()
    stand(line, "greedy", range(100))
    assert serve(line, 5) == [0, 1, 2, 3, 4]
    stand(line, "polite", range(100, 103))
    assert serve(line, 6) == [5, 100, 6, 101, 7, 102]
    assert serve(line, 200) == list(range(8, 100))
    assert not len(line)


def test_places_are_shared_although_one_client_came_first() -> None:
    """Six places come free one by one: the client without any gets them until both hold as many."""
    line = Line()
    stand(line, "greedy", range(20))
    running = [line.take(always) for _ in range(6)]
    stand(line, "polite", range(100, 120))
    for job in running[:3]:
        assert job is not None
        line.drop(job)
        assert line.take(always) in range(100, 120)
    assert (line.holds("greedy"), line.holds("polite"), line.holding) == (3, 3, 6)


def test_many_clients_take_turns_in_the_order_they_came() -> None:
    line = Line()
    for number, client in enumerate("abcabcabc"):
        line.add(number, client, 0)
    assert serve(line, 9) == list(range(9))


def test_a_higher_priority_goes_first_and_a_lower_one_does_not_starve() -> None:
    line = Line()
    stand(line, "batch", range(3), priority=-1)
    stand(line, "normal", range(10, 13))
    stand(line, "high", range(20, 120), priority=1)
    served = serve(line, 40)
    assert served[:PATIENCE] == list(range(20, 20 + PATIENCE))
    of_batch = [turn for turn, job in enumerate(served) if job < 3]
    of_normal = [turn for turn, job in enumerate(served) if 10 <= job < 13]
    for turns in (of_batch, of_normal):
        assert len(turns) == 3, "all of it got through although high never ended"
        waits = [later - earlier for earlier, later in zip([-1, *turns], turns, strict=False)]
        assert max(waits) <= PATIENCE + 2


def test_one_that_needs_more_room_is_overtaken_for_a_while_and_then_waited_for() -> None:
    line = Line()
    line.add(0, "large", 0)
    stand(line, "small", range(1, 50))
    overtook = []
    while (job := line.take(lambda job: job != 0)) is not None:
        overtook.append(job)
        line.drop(job)
    assert overtook == list(range(1, 1 + PATIENCE))
    assert line.take(always) == 0
    assert line.take(lambda job: job != 0) == 1 + PATIENCE, "nobody waits for it any more"


def test_one_that_left_is_not_waited_for() -> None:
    line = Line()
    line.add(0, "large", 0)
    stand(line, "small", range(1, 50))
    for _ in range(PATIENCE):
        line.take(lambda job: job != 0)
    assert line.take(lambda job: job != 0) is None
    line.drop(0)
    assert line.take(lambda job: job != 0) is not None


def test_who_leaves_a_full_line_is_the_newest_of_the_one_with_most() -> None:
    line = Line()
    stand(line, "greedy", range(10))
    stand(line, "other", range(20, 22))
    assert line.displaced_by("polite", 0) == 9
    assert line.displaced_by("greedy", 0) is None, "its own flood is its own"
    assert line.displaced_by("other", 0) == 9
    assert line.displaced_by("polite", -1) is None, "a lower priority pushes nobody out"
    assert line.displaced_by("greedy", 1) == 9
    stand(line, "night", range(30, 31), priority=-1)
    assert line.displaced_by("polite", 0) == 30, "the lowest priority goes first"
    equal = Line()
    stand(equal, "a", range(2))
    stand(equal, "b", range(2, 3))
    assert equal.displaced_by("b", 0) is None, "else they would push each other out for ever"
    assert Line().displaced_by("a", 0) is None


def test_whatever_happens_everyone_is_served_once_and_the_books_balance() -> None:
    rng = random.Random(5)
    for _ in range(50):
        line, held, waiting, served = Line(), {}, {}, Counter[int]()
        for number in range(300):
            match rng.randrange(4):
                case 0 | 1:
                    client, priority = rng.choice("abc"), rng.choice([-1, 0, 1])
                    line.add(number, client, priority)
                    waiting[number] = client
                case 2:
                    job = line.take(lambda job: job % 3 > 0)
                    if job is not None:
                        held[job] = waiting.pop(job)
                        served[job] += 1
                case _ if held or waiting:
                    job = rng.choice([*held, *waiting])
                    line.drop(job)
                    line.drop(job)
                    held.pop(job, None)
                    waiting.pop(job, None)
            assert (len(line), line.holding) == (len(waiting), len(held))
            for client in "abc":
                assert line.holds(client) == list(held.values()).count(client)
        for job in [*waiting, *held]:
            line.drop(job)
        assert vars(line) == vars(Line()), "nothing is kept of those who are gone"
        assert set(served.values()) <= {1}
