"""A model that has become much slower than it was on this machine is noticed; noise and slow drift are not."""

from pathlib import Path

import pytest

from supervisor.pace import judge
from supervisor.prediction import History


def test_the_first_load_is_the_baseline() -> None:
    assert judge(0.010, 0.0) == (1.0, 0.010)
    assert not judge(0.010, 0.0).slow


def test_an_eighth_of_the_speed_is_slow_and_does_not_become_the_baseline() -> None:
    pace = judge(0.0833, 0.010)
    assert pace.slow
    assert pace.share == pytest.approx(0.12, abs=0.001)
    assert pace.baseline_s == pytest.approx(0.0105)


def test_a_quicker_load_is_the_new_baseline() -> None:
    assert judge(0.008, 0.010) == (1.25, 0.008)


def test_a_change_for_good_is_accepted_after_a_dozen_loads_or_two() -> None:
    baseline, loads = 0.010, 0
    while (pace := judge(0.030, baseline)).slow:
        baseline, loads = pace.baseline_s, loads + 1
    assert 5 < loads < 25


@pytest.mark.parametrize("step_s", [0.0, -1.0])
def test_a_model_that_was_not_timed_is_not_judged(step_s: float) -> None:
    assert judge(step_s, 0.010) == (1.0, 0.010)


def test_the_baseline_outlives_the_supervisor_and_what_is_learnt_of_memory(tmp_path: Path) -> None:
    history = History(tmp_path / "memory")
    history.learn_pace("a", 0.01)
    history.learn("a", 5, 6)
    again = History(tmp_path / "memory")
    again.load()
    known = again.of("a")
    assert (again.pace_of("a"), again.pace_of("b")) == (0.01, 0.0)
    assert known is not None
    assert known.idle_bytes == 5


def test_baselines_are_bounded(tmp_path: Path) -> None:
    history = History(tmp_path / "memory")
    for number in range(250):
        history.learn_pace(str(number), 1.0)
    assert (history.pace_of("49"), history.pace_of("50")) == (0.0, 1.0)
