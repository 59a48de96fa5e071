"""Fixtures of the failure matrix's tests."""

import pytest

from tests.chaos.figures import Figure, record


@pytest.fixture
def figure() -> Figure:
    """Records a measured figure of a row beside its target."""
    return record
