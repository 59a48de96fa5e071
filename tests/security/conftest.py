"""Fixtures of the tests that count requests."""

import time

import pytest


@pytest.fixture
def no_minute_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the clock that limits read: when a minute of it ends between two requests, one more is granted."""
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now)
