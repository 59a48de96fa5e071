"""The judge of chaos runs can say no: each broken promise turns it red."""

import copy

import pytest

from tests.chaos.history import Outcome, Reference, check, ended_by_two_deaths

REFERENCES = {"a": Reference("one two three", "length", 3), "b": Reference("other words", "stop", 2)}


def good(**changes: object) -> Outcome:
    outcome = Outcome("m", "a", True, 10.0, 12.0, 200, "one two three", "length", 3, 1)
    for name, value in changes.items():
        setattr(outcome, name, value)
    return outcome


def broken(outcome: Outcome, *, deaths: tuple[float, ...] = ()) -> list[str]:
    return check([outcome], REFERENCES, limit_s=30, gateway_deaths=deaths).broken


def test_a_good_history_passes() -> None:
    verdict = check([good(), copy.copy(good())], REFERENCES, limit_s=30)
    assert (verdict.broken, verdict.share("m")) == ([], 1.0)
    error = {"code": "worker_crashed", "request_id": "req_1"}
    assert broken(good(error=error, text="one two", finish=None)) == []
    assert broken(good(cut="ReadError", text="one", ends=0), deaths=(11.0,)) == []
    assert broken(good(left=True, text="one", ends=0, finish=None)) == []


@pytest.mark.parametrize(
    "outcome",
    [
        good(ends=0),
        good(ends=2),
        good(after_end=1),
        good(text="one two"),
        good(text="one two two three"),
        good(text="other words"),
        good(finish="stop"),
        good(completion_tokens=4),
        good(ended_at=99.0),
        good(cut="ReadError", ends=0),
        good(error={"code": "internal_error", "request_id": "r"}),
        good(error={"code": "worker_crashed"}),
        good(error={"code": "worker_crashed", "request_id": "r"}, text="other"),
        good(left=True, text="other"),
        good(stream=False, ends=0, status=500),
    ],
)
def test_each_broken_promise_is_found(outcome: Outcome) -> None:
    assert broken(outcome)


def test_only_a_second_death_of_its_own_process_excuses_the_end_of_a_request() -> None:
    crashed = {"code": "worker_crashed", "request_id": "req_1"}
    ended = good(error=crashed, text="one", finish=None)
    assert ended_by_two_deaths(ended, [(10.5, "m"), (11.5, "m")])
    for second in ((10.5, "other"), (9.5, "m"), (12.5, "m")):
        assert not ended_by_two_deaths(ended, [(10.5, "m"), second])
    twice = [(10.5, "m"), (11.5, "m")]
    assert not ended_by_two_deaths(good(), twice)
    assert not ended_by_two_deaths(good(error={"code": "timeout"}), twice)
    assert not ended_by_two_deaths(good(cut="ReadError"), twice)
