"""A bug in one part of the supervisor does not end the others."""

import asyncio

import pytest

from supervisor.guard import Guard
from tests.logkit import logged


def test_an_exception_is_logged_counted_and_over() -> None:
    guard, reached = Guard(), []
    with logged() as seen:
        for name in ("a", "b", "c"):
            with guard("tick"):
                if name == "b":
                    secret = "Canary-Marker"
                    raise ValueError(secret)
                reached.append(name)
    assert (reached, guard.count) == (["a", "c"], 1)
    assert [(entry["event"], entry["where"]) for entry in seen] == [("internal_error", "tick")]
    assert "Canary-Marker" not in str(seen)


def test_what_ends_a_task_or_the_process_passes() -> None:
    guard = Guard()
    for error in (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), guard("tick"):
            raise error
    assert guard.count == 0
