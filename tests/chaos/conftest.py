"""Fixtures of the failure matrix's tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.figures import Figure, record
from tests.chaos.scene import Stage


@pytest.fixture
def figure() -> Figure:
    """Records a measured figure of a row beside its target."""
    return record


@pytest.fixture(scope="module")
def new_stage(tiny_model: Path) -> Iterator[Callable[..., Stage]]:
    """Makes stages for the rows of a file, and ends them after the last."""
    made: list[Stage] = []

    def make(**settings: str) -> Stage:
        made.append(Stage(tiny_model, **settings))
        return made[-1]

    yield make
    for stage in made:
        stage.close()
