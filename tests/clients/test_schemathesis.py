"""Schemathesis reads `/openapi.json` and sends what it allows, and what it forbids, to a real LMX. Never a 5xx."""

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.environments import MADE
from tests.harness import Lmx
from tests.modelkit import make_tiny_encoder, make_tiny_model

CHAT, ENCODER = "tiny", "tiny-encoder"
#: Bodies for the encoder; all others are for the chat model.
ENCODES = ("EmbeddingRequest", "RerankRequest")
_WITHIN_S = 240
pytestmark = pytest.mark.timeout(_WITHIN_S + 60)


@pytest.fixture(scope="module")
def lmx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lmx]:
    """One LMX with tiny models; the short context keeps every answer short."""
    folder = tmp_path_factory.mktemp("models")
    running = Lmx().start()
    try:
        running.load(make_tiny_model(folder / CHAT, context=48), CHAT)
        running.load(make_tiny_encoder(folder / ENCODER), ENCODER)
        yield running
    finally:
        running.close()


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with the names of models that are there: a text at random names none."""
    for name, schema in document["components"]["schemas"].items():
        if name.endswith("Request"):
            schema["properties"]["model"] = {"const": ENCODER if name in ENCODES else CHAT}
    return document


def test_what_the_description_allows_and_forbids_is_answered_as_described(lmx: Lmx, tmp_path: Path) -> None:
    program = MADE / "schemathesis" / "bin" / "schemathesis"
    if not (MADE / "schemathesis" / ".made-from").exists():
        pytest.skip("the environment schemathesis is not there: make clients (needs the registries)")
    described = tmp_path / "openapi.json"
    described.write_text(json.dumps(narrowed(httpx.get(f"{lmx.url}/openapi.json").json())))
    done = subprocess.run(
        [
            *(str(program), "run", str(described), "--url", lmx.url),
            *("--phases", "coverage,fuzzing", "--max-examples", "10", "--seed", "1", "--no-color"),
            *("--request-timeout", "30", "--continue-on-failure"),
            # A schema cannot say all that makes a request a good one: a prompt may be too long for the model.
            *("--exclude-checks", "positive_data_acceptance"),
            *("--report", "har", "--report-har-path", str(tmp_path / "report.har")),
        ],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if not key.startswith(("LMX_", "SCHEMATHESIS_"))},
        capture_output=True,
        text=True,
        timeout=_WITHIN_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    entries = json.loads((tmp_path / "report.har").read_text())["log"]["entries"]
    answers = Counter((httpx.URL(entry["request"]["url"]).path, entry["response"]["status"]) for entry in entries)
    assert not [answer for answer in answers if answer[1] >= 500], answers
    for path in ("chat/completions", "completions", "embeddings", "rerank", "tokenize", "detokenize"):
        assert answers[f"/v1/{path}", 200], (path, answers)
        assert answers[f"/v1/{path}", 400], (path, answers)
