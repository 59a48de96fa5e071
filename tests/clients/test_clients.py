"""Every client of the matrix does with LMX what it does with OpenAI. `make clients` makes the environments first."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.environments import HERE, LOCKS, MADE
from tests.clients.matrix import CLIENTS, Client, rows_of
from tests.harness import Lmx
from tests.modelkit import builtin_model

CHAT, EMBEDDER = "smollm2-135m-instruct", "all-minilm-l6-v2"
_WITHIN_S = 400
# Importing some of these takes most of a minute on a cold, busy machine.
pytestmark = pytest.mark.timeout(_WITHIN_S + 60)


@pytest.fixture(scope="module")
def lmx(real_model: Path) -> Iterator[Lmx]:
    """One LMX with a chat model and an embedding model."""
    running = Lmx(LMX_WORKER__BLAS_THREADS="2").start()
    try:
        running.load(real_model, CHAT)
        running.load(builtin_model(EMBEDDER), EMBEDDER)
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the evaluation harness leaves what it asked."""
    return tmp_path_factory.mktemp("samples")


def python_of(client: Client) -> Path:
    python = MADE / client.environment / "bin" / client.interpreter
    if not (MADE / client.environment / ".made-from").exists():
        pytest.skip(f"the environment {client.environment} is not there: make clients (needs the registries)")
    return python


def run(client: Client, lmx: Lmx, real_model: Path, samples: Path) -> dict[str, Any]:
    """Return what the client's program said of each feature."""
    program = HERE / "programs" / client.program
    if client.interpreter == "node":  # modules are looked for beside the file
        copy = MADE / client.environment / client.program
        copy.write_bytes(program.read_bytes())
        program = copy
    environ = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("LMX_", "OPENAI_"))},
        "LMX_TEST_URL": lmx.url,
        "LMX_TEST_MODEL": CHAT,
        "LMX_TEST_EMBEDDER": EMBEDDER,
        "LMX_TEST_FOLDER": str(real_model),
        "LMX_TEST_SAMPLES": str(samples),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [str(python_of(client)), str(program), *client.arguments],
        env=environ,
        capture_output=True,
        text=True,
        timeout=_WITHIN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    rows_of(client, lines)
    return {line["feature"]: line for line in lines}


@pytest.mark.parametrize("client", CLIENTS, ids=[client.name for client in CLIENTS])
def test_a_client_does_with_lmx_what_it_does_with_openai(
    client: Client, lmx: Lmx, real_model: Path, samples: Path
) -> None:
    said = run(client, lmx, real_model, samples)
    assert list(said) == list(client.features)
    broken = {feature: line["detail"] for feature, line in said.items() if not line["ok"]}
    assert not broken, "\n\n".join(f"{feature}:\n{detail}" for feature, detail in broken.items())


def test_the_harness_scores_the_model_as_it_is_in_process(lmx: Lmx, real_model: Path, samples: Path) -> None:
    assert lmx.url
    if not (samples / "choices.json").exists():
        pytest.skip("the evaluation harness did not run")
    subprocess.run(
        [sys.executable, "-m", "tests.clients.reference", str(real_model), str(samples)], check=True, timeout=_WITHIN_S
    )
    reference = json.loads((samples / "reference.json").read_text())
    choices = json.loads((samples / "choices.json").read_text())
    for row, expected in zip(choices["samples"], reference["choices"], strict=True):
        got = [float(answer[0]) for answer in row["answers"]]
        assert got == pytest.approx(expected, abs=2e-3)
        assert got.index(max(got)) == expected.index(max(expected))
    capitals = json.loads((samples / "capitals.json").read_text())
    assert [row["answers"][0] for row in capitals["samples"]] == reference["capitals"]
    assert choices["scores"]
    assert capitals["scores"]


def test_every_lock_has_a_client() -> None:
    others = {"schemathesis"}  # `test_schemathesis.py`
    assert {client.environment for client in CLIENTS} | others == {folder.name for folder in LOCKS.iterdir()}
