"""100,000 random lives of a host on a virtual clock: no schedule of events breaks what the policy promises (design 6).

What is promised stands in `tests/policykit.py`. One schedule again: `LMX_SCHEDULE=4711 make test ARGS="-k schedules"`.
"""

import os
import random
from collections import Counter
from collections.abc import Callable

import pytest

from protocol.states import Phase
from supervisor import events as ev
from tests.policykit import CONFIGS, ENDS, World, described

SCHEDULES = 100_000
#: So that no test takes long on a machine that is busy with others.
PARTS = 4
#: One schedule in so many is long: it gets through quarantine, probes and forgiveness.
LONG_EVERY = 200
LONG_STEPS = 100
SETTLE_EVERY = 25
#: What has to come to pass in so many schedules at least; a simulation in which nothing happens proves nothing.
AT_LEAST = 3
MUST_BE_SEEN = {
    *("hung and killed", "stubborn and killed", "set aside", "set aside for good", "tried again"),
    *("a probe stayed ready", "the breaker opened", "rationed by the breaker", "started after failures"),
    *("degraded", "adopted", "forgiven", "slept"),
}  # fmt: skip
JUMPS = (0.3, 2.0, 7.0, 25.0, 70.0, 310.0, 700.0, 4000.0)
STRAYS = (ev.Helloed(), ev.Moved(1, 2), ev.BecameReady(1.0), ev.Beat(Phase.DECODE, 9), ev.HasDrained())


def time_passes(world: World, rng: random.Random, i: int) -> None:
    seconds = JUMPS[int(rng.random() * len(JUMPS))]
    world.pass_time(seconds, 0.0 if rng.random() < 0.7 else rng.random() * 1.9)


def process_ends(world: World, rng: random.Random, i: int) -> None:
    world.end(i, ENDS[int(rng.random() * len(ENDS))], rng.random() * 2 - 1)


def operator_asks(world: World, rng: random.Random, i: int) -> None:
    match int(rng.random() * 8):
        case 0 | 1:
            world.unwant(i, force=rng.random() < 0.5)
        case 2:
            world.restart(i, force=rng.random() < 0.5)
        case 3:
            world.reset(i)
        case 4:
            world.set_aside(i)
        case _:
            world.want(i)


def something_odd(world: World, rng: random.Random, i: int) -> None:
    match int(rng.random() * 10):
        case 0:
            world.supervisor_dies()
        case 1:
            world.sleep(rng.random() * 9000)
        case 2:
            world.refuses = not world.refuses
        case 3:
            world.stray(i, STRAYS[int(rng.random() * len(STRAYS))])
        case 4:
            world.grow(i, int(rng.random() * 600))
        case 5:
            world.wake_up(i)
        case 6 | 7:
            world.weigh(i, int(rng.random() * 100))
        case _:
            falls_silent(world, rng, i)


def comes_up(world: World, rng: random.Random, i: int) -> None:
    """The process that is loading, or a random one, gets some way towards ready, mostly all of it."""
    i = next((k for k, process in enumerate(world.processes) if k and process is not None and process.coming_up), i)
    for _ in range(3 if rng.random() < 0.8 else 1):
        world.progress(i)


def works(world: World, rng: random.Random, i: int) -> None:
    if rng.random() < 0.8:
        world.progress(i)
    else:
        world.idle(i)


def falls_silent(world: World, rng: random.Random, i: int) -> None:
    world.fall_silent(i, stuck=rng.random() < 0.5)


def crashes_again(world: World, rng: random.Random, i: int) -> None:
    """It crashes, its delay passes, and it is up again or not."""
    world.end(i, ENDS[int(rng.random() * 6)], rng.random() * 2 - 1)
    world.pump()
    if rng.random() < 0.7:
        world.pass_time(80.0)
        world.pump()
    if rng.random() < 0.5:
        comes_up(world, rng, i)


def drains(world: World, rng: random.Random, i: int) -> None:
    world.drained(i)


Step = Callable[[World, random.Random, int], None]
#: Each schedule has a bent, so that a few steps get far; the long ones mix them.
MIXED: tuple[Step, ...] = (
    *(time_passes,) * 5,
    *(comes_up, process_ends, operator_asks) * 3,
    *(works, crashes_again, something_odd) * 2,
    falls_silent,
    drains,
)
BENTS: tuple[tuple[Step, ...], ...] = (
    MIXED,
    (crashes_again, crashes_again, crashes_again, time_passes, comes_up, process_ends),
    (falls_silent, falls_silent, works, comes_up, comes_up, time_passes, time_passes, time_passes, process_ends),
    (operator_asks, operator_asks, operator_asks, drains, comes_up, crashes_again, time_passes, process_ends),
    (process_ends, process_ends, process_ends, comes_up, comes_up, time_passes),
)


def play(seed: int) -> set[str]:
    """Play one schedule; an `AssertionError` says what was broken, in which schedule and how things stood."""
    rng = random.Random(seed)
    models = (1, 1, 2, 1, 3, 1, 2)[seed % 7]
    world = World(models, seed % len(CONFIGS))
    long = seed % LONG_EVERY == 0
    bent = MIXED if long else BENTS[int(rng.random() * len(BENTS))]
    try:
        for i in range(models + 1):
            if i > 0 or seed % 3 == 0:
                world.want(i)
        world.pump()
        for _ in range(LONG_STEPS if long else 1 + int(rng.random() * 4)):
            i = (1 + int(rng.random() * (models + 0.2))) % (models + 1)
            bent[int(rng.random() * len(bent))](world, rng, i)
            world.pump()
        if seed % SETTLE_EVERY == 0:
            world.settle()
    except AssertionError as error:
        msg = f"schedule {seed}, at {world.now} s: {error}\n{described(world)}"
        raise AssertionError(msg) from error
    return world.seen


@pytest.mark.parametrize("part", range(PARTS))
def test_no_schedule_of_100_000_breaks_a_promise_of_the_policy(part: int) -> None:
    only = os.environ.get("LMX_SCHEDULE")
    seen: Counter[str] = Counter()
    for seed in [int(only)] if only else range(part * SCHEDULES // PARTS, (part + 1) * SCHEDULES // PARTS):
        seen.update(play(seed))
    rare = {what: seen[what] for what in MUST_BE_SEEN if seen[what] < AT_LEAST}
    assert only or not rare, f"too rare to have been tested: {rare}"
