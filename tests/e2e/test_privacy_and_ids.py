"""Prompts, answers and keys stay out of everything LMX writes; a request id is found everywhere it went."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

from tests.harness import Lmx, chat, read_stream

PROMPT = "Zebra-Marker-77310"
KEY = "lmx-secret-key-55120"


def written(lmx: Lmx) -> dict[str, str]:
    """Return everything under the home that LMX wrote (models are not written by requests)."""
    files = (f for f in lmx.home.rglob("*") if f.is_file() and "models" not in f.relative_to(lmx.home).parts)
    return {str(f.relative_to(lmx.home)): f.read_bytes().decode("utf-8", "replace") for f in files}


async def test_no_prompt_answer_or_key_reaches_a_file(new_lmx: Callable[..., Lmx], tiny_model: Path) -> None:
    lmx = new_lmx(LMX_LOG__LEVEL="DEBUG", LMX_GATEWAY__ON_CRASH="fail").start()
    lmx.load(tiny_model, "alpha")
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=lmx.url, timeout=30, headers=headers) as http:
        url = "/v1/chat/completions"
        answers = [
            (await http.post(url, json=chat("alpha", max_tokens=40, stream=False, text=PROMPT))).json(),
            (await http.post(url, json=chat(PROMPT, max_tokens=4, stream=False, text=PROMPT))).json(),
            (await http.post(url, json=chat("alpha", max_tokens=4, stream=False, text=PROMPT * 5000))).json(),
            (await http.post(url, json=chat("alpha", max_tokens=-4, stream=False, text=PROMPT))).json(),
            (await http.post(url, json={"model": "alpha", "messages": [{"role": PROMPT, "content": PROMPT}]})).json(),
            (await http.post(url, content=f'{{"{PROMPT}": '.encode())).json(),
            (await http.get(f"/v1/{PROMPT}", params={"q": PROMPT})).json(),
            (await http.post(url, json={**chat("alpha", max_tokens=2, stream=False), PROMPT: PROMPT})).json(),
        ]
        text = answers[0]["choices"][0]["message"]["content"]
        assert len(text) > 10
        pid = lmx.model("alpha")["pid"]
        cut = await read_stream(
            http,
            chat("alpha", max_tokens=3000, stream=True, text=PROMPT),
            lambda stream: psutil.Process(pid).kill() if len(stream.chunks) == 5 else None,
        )
        assert cut.error is not None
    lmx.wait_model("alpha", other_than=1)
    assert lmx.stop() == 0
    for name, content in written(lmx).items():
        for secret in (PROMPT, KEY, text, cut.text):
            assert secret not in content, (name, secret[:20])


async def test_a_request_id_goes_from_the_header_to_the_worker_log_and_back(
    new_lmx: Callable[..., Lmx], tiny_model: Path
) -> None:
    lmx = new_lmx().start()
    lmx.load(tiny_model, "alpha")
    async with httpx.AsyncClient(base_url=lmx.url, timeout=30, headers={"X-Request-ID": "bot-42.a"}) as http:
        answer = await http.post("/v1/chat/completions", json=chat("alpha", max_tokens=3, stream=False))
        assert answer.headers["x-request-id"] == "bot-42.a"
        wrong = await http.post("/v1/chat/completions", json=chat("none", max_tokens=3, stream=False))
        assert wrong.json()["error"]["request_id"] == wrong.headers["x-request-id"] == "bot-42.a"
        made = await http.get("/healthz", headers={"X-Request-ID": "no spaces allowed"})
        assert made.headers["x-request-id"].startswith("req_")
    assert lmx.stop() == 0
    logs = {file.name: file.read_text() for file in (lmx.home / "logs").glob("*.log")}
    for name in ("gateway.log", next(name for name in logs if name.startswith("alpha"))):
        lines = [json.loads(line) for line in logs[name].splitlines()]
        events = [line["event"] for line in lines if "bot-42.a" in json.dumps(line)]
        assert events, name
        assert all({"ts", "level", "process", "pid", "event"} <= set(line) for line in lines)
