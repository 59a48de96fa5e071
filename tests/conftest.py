"""Fixtures that more than one kind of test uses."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Its plugin imports it for the summary: compiling it in a process that has done much can fail in CPython 3.11.
import hypothesis
import pytest

from protocol.builtin_models import EMBEDDING_MODEL_ID
from tests.harness import Lmx
from tests.modelkit import builtin_model, default_model, make_tiny_model

# A machine that takes its cores away for a moment makes any example slow; the time of a test has a bound of its own.
# The suite has the same examples each time, so that it is red for a change and not by chance. `explore` looks for more.
_SLOW = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("lmx", deadline=None, suppress_health_check=_SLOW, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, suppress_health_check=_SLOW, max_examples=1000)
hypothesis.settings.load_profile("lmx")


@pytest.fixture(scope="session")
def tiny_model() -> Iterator[Path]:
    """A 2-layer random model with a real tokenizer, made in about a second."""
    folder = Path(tempfile.mkdtemp(prefix="lmx-tiny-", dir="/tmp"))
    yield make_tiny_model(folder / "tiny")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The default model's folder; fetched once per machine."""
    return default_model(None)


@pytest.fixture(scope="session")
def embedding_model() -> Path:
    """The built-in embedding model's folder; fetched once per machine."""
    return builtin_model(EMBEDDING_MODEL_ID)


@pytest.fixture
def new_lmx() -> Iterator[Callable[..., Lmx]]:
    """Makes LMX homes and ends them after the test."""
    made: list[Lmx] = []

    def make(**settings: str) -> Lmx:
        made.append(Lmx(**settings))
        return made[-1]

    yield make
    for lmx in made:
        lmx.close()
