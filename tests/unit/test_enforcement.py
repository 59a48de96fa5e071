"""What is done about too much memory, on a virtual clock."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.config import MemoryConfig
from supervisor.enforcement import Order, Watch, Whole, drift, ended, should_ease, watch, whole
from supervisor.platform.base import Pressure

CONFIG = MemoryConfig()
LIMIT = 1000
MIB = 1024**2


def orders(shares: Iterable[int | None], *, idle: bool = False, step_s: float = 0.25) -> list[Order]:
    """What is done after each sample of a worker with a limit of 1,000."""
    seen, done, now = Watch(), [], 0.0
    for share in shares:
        seen, order = watch(seen, share, LIMIT, CONFIG, now=now, idle=idle)
        done.append(order)
        now += step_s
    return done


N, EASE, ADMIT, REPLACE, END = Order.NOTHING, Order.EASE, Order.ADMIT, Order.REPLACE, Order.END


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([849, 849, 849], [N, N, N]),
        ([850, 849, 850], [N, N, N]),
        ([850, 850, 900, 900], [N, EASE, N, N]),
        ([850, 850, 820, 820, 799, 799, 799], [N, EASE, N, N, N, ADMIT, N]),
        ([950, 950], [N, REPLACE]),
        ([950, 900, 950, 950], [N, EASE, N, REPLACE]),
        ([1050, 1050], [N, END]),
        ([960, 1050, 1050], [N, EASE, END]),
        ([960, 1050, 960, 960], [N, EASE, REPLACE, REPLACE]),
        ([9999, 9999], [N, END]),
        ([1050, 0, 1050], [N, N, N]),
    ],
)
def test_it_takes_two_samples(shares: list[int], expected: list[Order]) -> None:
    assert orders(shares) == expected


def test_a_missing_sample_is_neither_good_nor_bad() -> None:
    assert orders([1050, None, None, 1050]) == [N, N, N, END]
    assert orders([850, 850, None, None, None]) == [N, EASE, N, N, N], "unknown is not empty"


def test_a_process_that_cannot_be_measured_is_unmonitored_after_a_while() -> None:
    seen = Watch()
    for _ in range(11):
        seen, _ = watch(seen, None, LIMIT, CONFIG, now=0, idle=True)
    assert not seen.unmonitored
    seen, _ = watch(seen, None, LIMIT, CONFIG, now=0, idle=True)
    assert seen.unmonitored
    seen, _ = watch(seen, 1, LIMIT, CONFIG, now=0, idle=True)
    assert not seen.unmonitored


def test_without_a_limit_nothing_is_done() -> None:
    seen = Watch()
    for _ in range(5):
        seen, order = watch(seen, 10**15, 0, CONFIG, now=0, idle=True)
        assert order is N


def test_one_that_is_closed_idle_and_still_full_is_replaced() -> None:
    """It would refuse every request for ever."""
    done = orders([900] * 45, idle=True)
    assert done[:2] == [N, EASE]
    assert REPLACE in done[40:]
    assert REPLACE not in orders([900] * 45, idle=False)


def drifts(extra: Iterable[int], *, idle: bool, step_s: float = 1.0) -> list[bool]:
    seen, done, now = Watch(), [], 0.0
    for each in extra:
        seen, found = drift(seen, 500 * MIB + each, 500 * MIB, 400 * MIB, CONFIG, now=now, idle=idle)
        done.append(found)
        now += step_s
    return done


def test_drift_is_replaced_soon_when_idle_and_after_the_grace_when_not() -> None:
    assert drifts([201 * MIB] * 9, idle=True).index(True) == 5
    assert drifts([199 * MIB] * 5, idle=True) == [False] * 5
    busy = drifts([201 * MIB] * 400, idle=False)
    assert busy.index(True) == CONFIG.rotate_grace_s
    assert drifts([201 * MIB, 0, 201 * MIB], idle=True) == [False] * 3


def test_drift_is_of_nothing_unknown() -> None:
    for footprint, expected, need in ((None, 1, 1), (10**12, None, 1), (10**12, 1, 0)):
        assert drift(Watch(), footprint, expected, need, CONFIG, now=0, idle=True) == (Watch(), False)
    never = MemoryConfig(rotate=0)
    assert drift(Watch(), 10**12, 1, 1, never, now=0, idle=True) == (Watch(), False)


def test_the_machine_sheds_above_its_mark_and_stops_below_another() -> None:
    seen, shed = Whole(), []
    for used in (0.94, 0.96, 0.96, 0.94, 0.94, None, 0.92, 0.92, 0.5):
        seen, _ = whole(seen, used, Pressure.NORMAL, CONFIG, 0)
        shed.append(seen.shedding)
    assert shed == [False, False, True, True, True, True, True, False, False]


@pytest.mark.parametrize(
    ("used", "pressure"), [(0.5, Pressure.CRITICAL), (None, Pressure.CRITICAL), (0.99, Pressure.NORMAL), (0.99, None)]
)
def test_a_critical_machine_ends_the_largest_and_waits_for_the_effect(
    used: float | None, pressure: Pressure | None
) -> None:
    seen, done, now = Whole(), [], 0.0
    for _ in range(40):
        seen, end = whole(seen, used, pressure, CONFIG, now)
        if end:
            seen = ended(seen, now)
            done.append(now)
        now += 0.25
    assert done == [0.25, 5.25]


def test_a_warning_ends_nothing() -> None:
    seen = Whole()
    for _ in range(10):
        seen, end = whole(seen, 0.9, Pressure.WARNING, CONFIG, 0)
        assert not end


def test_a_system_that_says_nothing_is_unmonitored() -> None:
    seen, _ = whole(Whole(), None, None, CONFIG, 0)
    assert not seen.unmonitored
    seen, _ = whole(seen, None, None, CONFIG, 0)
    assert seen.unmonitored
    seen, _ = whole(seen, 0.1, None, CONFIG, 0)
    assert not seen.unmonitored


@given(st.lists(st.none() | st.integers(0, 2000), max_size=60), st.booleans())
def test_whatever_is_measured_nothing_drastic_comes_without_two_bad_samples(
    samples: list[int | None], idle: bool
) -> None:
    done = orders(samples, idle=idle)
    known: list[int] = []
    closed = False
    for sample, order in zip(samples, done, strict=True):
        known += [] if sample is None else [sample]
        if order is END:
            assert min(known[-2:]) >= 1050
        if order is ADMIT:
            assert closed
            assert max(known[-2:]) < 800
        if order is EASE:
            assert not closed
        closed = (closed or order is EASE) and order is not ADMIT


@pytest.mark.parametrize(
    ("used", "pressure", "eases"),
    [
        (0.89, Pressure.NORMAL, False),
        (0.91, Pressure.NORMAL, True),
        (0.5, Pressure.WARNING, True),
        (0.5, Pressure.CRITICAL, True),
        (0.5, None, False),
        (None, None, False),
        (None, Pressure.WARNING, True),
    ],
)
def test_caches_give_way_before_anybody_is_refused(used: float | None, pressure: Pressure | None, eases: bool) -> None:
    assert should_ease(used, pressure, CONFIG) == eases
    assert not whole(Whole(), 0.91, Pressure.NORMAL, CONFIG, 0.0)[0].shedding
