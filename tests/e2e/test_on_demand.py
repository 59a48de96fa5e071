"""A model of `models.on_demand` is loaded by the first request, once however many ask, and they all wait for it."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.harness import Lmx, chat


@pytest.fixture
def lmx(new_lmx: object, tiny_model: Path) -> Lmx:
    running: Lmx = new_lmx(LMX_MODELS__ON_DEMAND='["lazy"]')  # type: ignore[operator]
    for name in ("lazy", "asked-for"):
        shutil.copytree(tiny_model, running.home / "models" / name)
    return running.start()


def starts(lmx: Lmx, model: str) -> int:
    return sum(entry["event"] == "process_started" and entry.get("model") == model for entry in lmx.journal())


def test_the_first_requests_load_it_once_and_are_all_answered(lmx: Lmx) -> None:
    url = lmx.url

    def ask(number: int) -> tuple[int, str]:
        body = chat("lazy", max_tokens=4, stream=number % 2 == 0)
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        return answer.status_code, answer.text

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    assert {status for status, _ in answers} == {200}, answers
    assert all("data: [DONE]" in text or '"usage"' in text for _, text in answers)
    assert starts(lmx, "lazy") == 1
    assert lmx.wait_event("load_on_demand", model="lazy")


def test_after_an_unload_the_next_request_brings_it_back(lmx: Lmx) -> None:
    body = chat("lazy", max_tokens=2, stream=False)
    for _ in range(2):
        assert httpx.post(f"{lmx.url}/v1/chat/completions", json=body, timeout=60).status_code == 200
        lmx.cli("unload", "lazy")
    assert starts(lmx, "lazy") == 2


def test_a_model_that_only_an_operator_loads_is_not_loaded(lmx: Lmx) -> None:
    body = chat("asked-for", max_tokens=2, stream=False)
    answer = httpx.post(f"{lmx.url}/v1/chat/completions", json=body, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert "lmx-supervisor load asked-for" in answer.json()["error"]["message"]
    assert starts(lmx, "asked-for") == 0
