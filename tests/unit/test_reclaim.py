"""When the next process of a model may start after the last one died (design 6: never on top of missing memory)."""

import pytest

from supervisor.reclaim import Owed, Verdict, judge, owed, words

GIB = 1024**3
DEBT = Owed(needed=90 * GIB, since=100.0)


@pytest.mark.parametrize(
    ("available", "now", "verdict"),
    [
        (90 * GIB, 100.0, Verdict.START),
        (90 * GIB - 1, 100.0, Verdict.WAIT),
        (0, 109.9, Verdict.WAIT),
        (0, 110.0, Verdict.BLOCK),
        (0, 1e9, Verdict.BLOCK),
        (91 * GIB, 1e9, Verdict.START),
        (None, 100.0, Verdict.WAIT),
        (None, 110.0, Verdict.START),
    ],
)
def test_a_start_waits_for_what_it_needs_and_an_unknown_is_never_nothing(
    available: int | None, now: float, verdict: Verdict
) -> None:
    assert judge(DEBT, available, now, 10.0) is verdict


def test_nothing_is_owed_by_a_process_that_was_never_measured() -> None:
    assert owed(0, 40 * GIB, 1.0) is None
    assert judge(None, 0, 1.0, 10.0) is Verdict.START


def test_the_next_process_needs_its_weights_and_not_all_that_a_leaking_one_had() -> None:
    assert owed(100 * GIB, 40 * GIB, 7.0) == Owed(50 * GIB, 7.0)
    assert owed(30 * GIB, 40 * GIB, 7.0) == Owed(30 * GIB, 7.0)
    assert owed(30 * GIB, 0, 7.0) == Owed(30 * GIB, 7.0)


def test_the_words_name_what_is_missing_and_what_helps() -> None:
    text = words(DEBT, 20 * GIB, 112.0)
    assert "MEMORY NOT RECLAIMED 12 s after" in text
    assert "90.0 GiB" in text
    assert "20.0 GiB" in text
    assert "restart of the machine" in text
