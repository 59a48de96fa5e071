"""Prompts, answers and keys stay out of everything LMX writes; a request id is found everywhere it went."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from protocol.audit import AuditReader, Filter
from protocol.keys import new_key
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


def _marker(place: str) -> str:
    return f"Zq{place}Marker77q"


class Markers:
    """Secrets, each with a text of its own, so that what leaked is told from where."""

    def __init__(self) -> None:
        self.prompt, self.system, self.tool, self.argument = map(_marker, ("prompt", "system", "tool", "argument"))
        self.schema, self.stop, self.user, self.field = map(_marker, ("schema", "stop", "user", "field"))
        self.path, self.query, self.model, self.cookie = map(_marker, ("path", "query", "model", "cookie"))
        self.basic = _marker("basic")
        #: Of our form, but nobody's; given as ids too.
        self.foreign, self.as_id = new_key(), new_key()
        self.as_client = "sk-proj-ZqclientMarkerq"

    def __iter__(self) -> Iterator[str]:
        yield from vars(self).values()


def bodies(m: Markers, word: str, **more: object) -> dict[str, dict[str, Any]]:
    """Return a body for every endpoint that takes one; `word` is the order to the fault worker.

    Which model an administrator names is in the journal on purpose.
    """
    text = f"{m.prompt} {word}".strip()
    function = {"name": "count", "description": m.tool, "parameters": {"type": "object", "title": m.schema}}
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": m.system},
        {"role": "user", "content": m.prompt},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "count", "arguments": f'{{"to": "{m.argument}"}}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": m.tool},
        {"role": "user", "content": text},
    ]
    common = {"model": "alpha", "max_tokens": 60, "stop": m.stop, "user": m.user, "metadata": {"note": m.user}, **more}
    return {
        "/v1/chat/completions": {**common, "messages": turns, "tools": [{"type": "function", "function": function}]},
        "/v1/completions": {**common, "prompt": text},
        "/v1/embeddings": {"model": "alpha", "input": [m.prompt], "user": m.user},
        "/v1/rerank": {"model": "alpha", "query": m.prompt, "documents": [m.prompt]},
        "/v1/tokenize": {"model": "alpha", "prompt": m.prompt},
        "/v1/detokenize": {"model": "alpha", "tokens": [1, 2], m.field: 1},
        "/admin/models/load": {"model": "absent"},
        "/admin/models/unload": {"model": "absent"},
        "/admin/models/restart": {"model": "absent", m.field: m.field},
    }


async def test_markers_in_every_place_of_every_request_survive_no_fault_in_any_file(
    new_lmx: Callable[..., Lmx], tiny_model: Path
) -> None:
    """At level DEBUG; what leaves by the API is looked at too: metrics, logs, journal, crashes, audit."""
    m = Markers()
    lmx = new_lmx(
        LMX_WORKER__MODULE="tests.fault",
        LMX_FAULT=json.dumps({"words": f"could not go on after {m.prompt} {m.system}"}),
        LMX_LOG__LEVEL="DEBUG",
        LMX_LIFECYCLE__HEARTBEAT_S="0.2",
        LMX_LIFECYCLE__DECODE_S="2",
        LMX_LIFECYCLE__PREFILL_S="2",
        LMX_LIFECYCLE__BREAKER_FAILURES="1000",
        LMX_LIFECYCLE__BURST_FAILURES="1000",
        LMX_LIFECYCLE__SLOW_FAILURES="1000",
        LMX_LIFECYCLE__UNREADY_FAILURES="1000",
        LMX_LIFECYCLE__STABLE_S="0.05",
        LMX_LIFECYCLE__STOP_MIN_S="1",
        LMX_LIFECYCLE__STOP_BASE_S="1",
    ).start()
    key = lmx.cli("keys", "create", "--name", "bot").stdout.strip()
    admin = (lmx.home / "admin.key").read_text().strip()
    await asyncio.to_thread(lmx.load, tiny_model, "alpha")
    always = {
        "x-request-id": m.as_id, "x-client-id": m.as_client, "cookie": f"session={m.cookie}", "user-agent": m.user,
        "referer": f"http://x/{m.path}", "x-lmx-on-crash": "fail",
    }  # fmt: skip
    bearer = {"authorization": f"Bearer {key}"}
    said: list[str] = []
    async with httpx.AsyncClient(base_url=lmx.url, timeout=60, headers=always, trust_env=False) as http:
        for path, body in bodies(m, "").items():
            allowed = {"authorization": f"Bearer {admin}"} if path.startswith("/admin") else bearer
            answer = await http.post(path, json=body, headers=allowed)
            assert answer.status_code < 500 or answer.json().get("code") == "supervisor_unavailable", answer.text
            if path == "/v1/chat/completions":
                assert answer.status_code == 200, answer.text
                said.append(answer.json()["choices"][0]["message"]["content"])
            broken = json.dumps(body)[:-9].encode()
            wrong = {**body, "messages": m.prompt, "temperature": m.prompt, m.field: m.field}
            if not path.startswith("/admin"):
                wrong["model"] = m.model
            for content in (broken, json.dumps(wrong).encode(), m.prompt.encode(), b"\xff" + m.prompt.encode()):
                assert 400 <= (await http.post(path, content=content, headers=allowed)).status_code < 500
            for credential in (f"Bearer {m.foreign}", f"Basic {m.basic}", f"Bearer {m.basic}\u00e9".encode()):
                refused = await http.post(path, json=body, headers=[*bearer.items(), ("authorization", credential)])  # type: ignore[list-item]
                assert refused.status_code in {401, 403, 503}
        for path in (
            f"/v1/{m.path}",
            f"/v1/models/{m.path}",
            f"/admin/{m.path}",
            f"/{m.path}/../x",
            f"/healthz?{m.query}",
        ):
            await http.get(path, params={"q": m.query, "key": key}, headers=bearer)
        for path in ("/admin/events", "/admin/audit", "/admin/logs", "/admin/models/fit", f"/admin/crashes/{m.path}"):
            answer = await http.get(
                path, params={"model": m.query, "x": m.query}, headers={"authorization": f"Bearer {admin}"}
            )
            assert 400 <= answer.status_code < 500, path
        with contextlib.suppress(InvalidStatus):
            async with connect(
                f"ws{lmx.url[4:]}/ws/audit-logs?{m.query}", additional_headers=[("x-api-key", m.foreign)], proxy=None
            ):
                pass
        calling = bodies(m, "[[call]]", stream=True)["/v1/chat/completions"]
        assert (await read_stream(http, calling)).done
        # Before the first token, in the middle, without a word, with words, hung, and in the thread that speaks.
        for number, word in enumerate(("abort 0", "abort 5", "raise 3", "freeze 3", "io", "kill 2")):
            before = lmx.model("alpha")["incarnation"]
            path = "/v1/completions" if word == "kill 2" else "/v1/chat/completions"
            sent = bodies(m, f"[[{word}]]", stream=number % 3 == 0)[path]
            answer = await http.post(path, json=sent, headers=bearer)
            assert answer.status_code >= 400 or "error" in answer.text, word
            said.append("".join(f"tok{n} " for n in range(3)))
            await asyncio.to_thread(lmx.wait_model, "alpha", other_than=before)
        shown = [
            (await http.get(path, headers={"authorization": f"Bearer {admin}"})).text
            for path in ("/metrics", "/admin/logs?n=1000", "/admin/crashes", "/admin/audit?limit=1000", "/admin/status")
        ]
    shown += [
        lmx.cli(*words, check=False).stdout for words in (("audit", "--export", "jsonl"), ("crashes",), ("status",))
    ]
    assert lmx.stop() == 0
    with AuditReader(lmx.home / "audit.db") as reader:
        rows = [row for rows in reader.pages(Filter()) for row in rows]
    assert {row.error_type for row in rows} >= {"worker_crashed", "invalid_json", "invalid_api_key", None}
    assert len(list((lmx.home / "crashes").glob("*/record.json"))) >= 6
    files = written(lmx)
    assert any(name.endswith("stacks.txt") for name in files)
    assert "inference_failed" in files["logs/gateway.log"]
    for name, content in [*files.items(), *(("shown", text) for text in shown)]:
        for secret in (*m, key, admin, *said):
            allowed_here = name == "admin.key" and secret == admin
            assert allowed_here or secret not in content, (name, secret[:30], _around(content, secret))


def _around(text: str, word: str) -> str:
    place = text.find(word)
    return text[max(0, place - 200) : place + 20]


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
    with AuditReader(lmx.home / "audit.db") as reader:
        rows = reader.page(Filter(request_id="bot-42.a"), limit=10)
    assert sorted(row.error_type or "" for row in rows) == ["", "model_not_found"]
    logs = {file.name: file.read_text() for file in (lmx.home / "logs").glob("*.log")}
    for name in ("gateway.log", next(name for name in logs if name.startswith("alpha"))):
        lines = [json.loads(line) for line in logs[name].splitlines()]
        events = [line["event"] for line in lines if "bot-42.a" in json.dumps(line)]
        assert events, name
        assert name != "gateway.log" or {"http_request", "inference_complete"} <= set(events)
        assert all({"ts", "level", "process", "pid", "event"} <= set(line) for line in lines)
