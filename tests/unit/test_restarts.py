"""Restart delays, forgiveness and crash loops (design 6), on numbers alone."""

import pytest

from protocol.config import LifecycleConfig
from supervisor.restarts import History, Verdict, after_failure, gateway_policy, worker_policy

CONFIG = LifecycleConfig()
WORKER = worker_policy(CONFIG)
GATEWAY = gateway_policy(CONFIG)


def fail(history: History, now: float, ready_for_s: float | None = None, load_s: float = 1.0) -> Verdict:
    return after_failure(WORKER, history, now=now, ready_for_s=ready_for_s, load_s=load_s, luck=0.0)


def test_first_restart_is_immediate_only_after_a_minute_of_ready() -> None:
    assert fail(History(), 0, ready_for_s=60).delay_s == 0
    assert fail(History(), 0, ready_for_s=59).delay_s == 1
    assert fail(History(), 0).delay_s == 1


def test_delays_grow_as_designed_and_stay_at_the_last() -> None:
    history, delays = History(), []
    for k in range(8):
        verdict = fail(history, now=k * 10_000.0, ready_for_s=61 if k == 0 else 1)
        history = verdict.history
        delays.append(verdict.delay_s)
    assert delays == [0, 1, 2, 5, 15, 30, 60, 60]


@pytest.mark.parametrize(("luck", "delay"), [(-1.0, 0.8), (1.0, 1.2)])
def test_jitter_spreads_a_delay_by_a_fifth(luck: float, delay: float) -> None:
    verdict = after_failure(WORKER, History(), now=0, ready_for_s=None, load_s=1, luck=luck)
    assert verdict.delay_s == pytest.approx(delay)


def test_one_failure_is_forgiven_per_300_s_of_ready_and_all_after_600_s() -> None:
    three = History(failed_at=(0.0, 1.0, 2.0), attempt=4)
    assert fail(three, 1000, ready_for_s=299).history.attempt == 5
    assert fail(three, 1000, ready_for_s=300).history.attempt == 4
    assert fail(three, 1000, ready_for_s=600).history == History(failed_at=(1000.0,), attempt=1)


def test_three_failures_within_a_minute_are_a_crash_loop() -> None:
    history = fail(fail(History(), 0, ready_for_s=5).history, 29, ready_for_s=5).history
    assert fail(history, 60, ready_for_s=5).why is not None
    assert fail(history, 61, ready_for_s=5).why is None


def test_three_failures_in_a_row_before_ready_are_a_crash_loop_however_slow() -> None:
    history = fail(fail(History(), 0).history, 5_000).history
    assert fail(history, 10_000).why is not None
    assert fail(fail(history, 9_000, ready_for_s=1).history, 19_000).why is None


def test_five_failures_of_a_slow_loader_trip_in_a_window_that_fits_five_loads() -> None:
    history = History()
    for k in range(4):
        verdict = fail(history, k * 300.0, ready_for_s=1, load_s=200)
        assert verdict.why is None
        history = verdict.history
    assert fail(history, 1200.0, ready_for_s=1, load_s=200).why is not None
    assert fail(history, 1200.0, ready_for_s=1, load_s=1).why is None


def test_the_gateway_is_never_given_up_and_first_comes_back_at_once() -> None:
    history = History()
    for k in range(20):
        verdict = after_failure(GATEWAY, history, now=k * 0.1, ready_for_s=0.1, load_s=0, luck=0)
        assert verdict.why is None
        assert k > 0 or verdict.delay_s == 0
        history = verdict.history


def test_history_is_bounded() -> None:
    history = History()
    for k in range(100):
        history = fail(history, k * 1e4).history
    assert len(history.failed_at) <= 64
