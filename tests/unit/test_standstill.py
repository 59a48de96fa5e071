"""A standstill is seen wherever it falls, and being merely late is none."""

import math

import pytest

from protocol.standstill import Standstill


@pytest.fixture
def still() -> Standstill:
    return Standstill(slept_s=3.0, now=100.0)


def test_a_rest_that_ends_when_it_should_is_no_standstill(still: Standstill) -> None:
    still.rest_until(200.0)
    assert still.look(200.5) == 0
    still.rest_until(300.0)
    assert still.look(250.0) == 0  # woken early


def test_a_machine_that_slept_while_its_owner_rested_is_seen(still: Standstill) -> None:
    still.rest_until(110.0)
    assert still.look(3710.0) == 3600


def test_a_machine_that_slept_in_the_middle_of_work_is_seen(still: Standstill) -> None:
    still.rest_until(110.0)
    assert still.look(105.0) == 0
    assert still.look(115.0) == 10  # nobody rested: the second look was due at once


def test_a_standstill_is_told_once(still: Standstill) -> None:
    assert still.look(500.0) == 400
    assert still.look(500.1) == 0


def test_late_by_no_more_than_allowed_is_no_standstill(still: Standstill) -> None:
    still.rest_until(110.0)
    assert still.look(113.0) == 0


def test_before_the_first_rest_nothing_is_late() -> None:
    still = Standstill(slept_s=3.0, now=math.inf)
    assert still.look(1000.0) == 0
