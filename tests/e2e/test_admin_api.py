"""The admin API of a whole running system (workers without MLX: what is promised here is not about tokens)."""

import json
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

from gateway.admin import admin_routes
from gateway.audit import Audit
from gateway.catalog import CatalogView
from gateway.forward import Forwarder
from gateway.traffic import Traffic
from gateway.vitals import VitalsView
from tests.harness import Lmx, chat, deadline

FAULT = {"LMX_WORKER__MODULE": "tests.fault"}
#: Its canary fails, each time.
GAMMA = json.dumps({"models": ["gamma"], "at": "warming", "deed": "exit"})
ACTIONS = ("load", "unload", "restart", "pin", "unpin", "reset")


class Admin:
    """A running LMX and its administrator."""

    def __init__(self, lmx: Lmx, model: Path) -> None:
        self.lmx = lmx
        for name in ("alpha", "beta", "gamma"):
            shutil.copytree(model, lmx.home / "models" / name)
        lmx.start()
        self.key = (lmx.home / "admin.key").read_text().strip()
        self.http = httpx.Client(base_url=lmx.url, timeout=60, headers={"authorization": f"Bearer {self.key}"})

    def get(self, path: str, status: int = 200) -> Any:
        return self.checked(self.http.get(path), status)

    def post(self, path: str, body: Any = None, status: int = 200, **headers: str) -> Any:
        return self.checked(self.http.post(path, json=body, headers=headers), status)

    def metric(self, name: str, **labels: str) -> float:
        for metric in self.get("/metrics?format=json")["metrics"]:
            for sample in metric["samples"]:
                if (sample["name"], sample["labels"]) == (name, labels):
                    return float(sample["value"])
        return -1.0

    def until_metric(self, wanted: float, name: str, **labels: str) -> None:
        for _ in deadline(30):
            if self.metric(name, **labels) == wanted:
                return
        raise AssertionError((name, labels, self.metric(name, **labels)))

    def checked(self, answer: httpx.Response, status: int) -> Any:
        assert answer.status_code == status, (answer.text, self.lmx.tail())
        if status >= 400:
            assert answer.headers["content-type"] == "application/problem+json"
            assert {"type", "title", "status", "detail", "code", "request_id"} <= set(answer.json())
        return answer.json()


@contextmanager
def running(model: Path) -> Iterator[Admin]:
    lmx = Lmx(**FAULT, LMX_FAULT=GAMMA)
    try:
        made = Admin(lmx, model)
        yield made
        made.http.close()
    finally:
        lmx.close()


@pytest.fixture(scope="module")
def admin(tiny_model: Path) -> Iterator[Admin]:
    """One system for the tests that leave no model loaded and nothing changed."""
    with running(tiny_model) as made:
        yield made


@pytest.fixture
def own_admin(tiny_model: Path) -> Iterator[Admin]:
    with running(tiny_model) as made:
        yield made


def test_models_are_loaded_kept_replaced_and_unloaded_over_http_and_the_journal_says_by_whom(admin: Admin) -> None:
    assert sorted(admin.get("/admin/models")["loadable"]) == ["alpha", "beta", "gamma"]
    fit = admin.get("/admin/models/fit?model=alpha")
    assert fit["need_bytes"] > 0
    assert fit["available_bytes"] > 0
    assert (fit["fits"], fit["would_evict"]) == (True, [])
    loaded = admin.post("/admin/models/load", {"model": "alpha", "pin": True, "ttl_s": 3600}, **{"x-request-id": "l1"})
    (alpha,) = admin.get("/admin/models")["models"]
    assert (alpha["state"], alpha["pid"]) == ("ready", loaded["new_pid"])
    assert (alpha["pinned"], alpha["ttl_s"]) == (True, 3600)
    admin.post("/admin/models/unpin", {"model": "alpha"})
    admin.post("/admin/models/reset", {"model": "alpha"})
    replaced = admin.post("/admin/models/restart", {"model": "alpha"})
    assert replaced["old_pid"] == loaded["new_pid"] != replaced["new_pid"]
    begun = admin.http.post("/admin/load", json={"model": "beta", "wait": False})
    assert begun.status_code in {200, 202}, begun.text
    admin.lmx.wait_model("beta")
    answer = admin.http.post("/v1/chat/completions", json=chat("beta", max_tokens=4, stream=False))
    assert answer.status_code == 200, answer.text
    admin.post("/admin/models/unload", {"model": "alpha"})
    admin.post("/admin/unload", {"model": "beta"})
    assert admin.get("/admin/status")["models"] == []
    actions = [entry for entry in admin.lmx.journal() if entry["event"] == "admin_action"]
    assert [(a["action"], a["model"]) for a in actions] == [
        ("load", "alpha"), ("unpin", "alpha"), ("reset", "alpha"), ("restart", "alpha"), ("load", "beta"),
        ("unload", "alpha"), ("unload", "beta"),
    ]  # fmt: skip
    assert {(a["by"], a["address"]) for a in actions} == {("admin", "127.0.0.1")}
    assert actions[0]["request_id"] == "l1"
    assert admin.key not in (admin.lmx.home / "state" / "events.jsonl").read_text()


def test_what_cannot_be_done_is_a_problem_in_words_and_never_a_500(admin: Admin) -> None:
    for path in (f"/admin/models/{action}" for action in ACTIONS):
        assert admin.post(path, {"model": "nobody"}, 404)["code"] == "model_not_found"
        assert admin.post(path, {}, 400)["code"] == "missing_field"
        assert admin.post(path, {"model": 7}, 400)["code"] == "invalid_type"
        assert "modle" in admin.post(path, {"model": "alpha", "modle": 1}, 400)["detail"]
        assert admin.checked(admin.http.post(path, content=b"{"), 400)["code"] == "invalid_json"
        assert admin.checked(admin.http.post(path, content=b" " * 100_000), 413)["code"] == "body_too_large"
    for name in ("../state", "/etc", "a\0b", "x" * 5000, ".", ""):
        assert admin.post("/admin/models/load", {"model": name}, 400)["code"] == "invalid_value"
        fit = admin.http.get("/admin/models/fit", params={"model": name or " "})
        assert admin.checked(fit, 404)["code"] == "model_not_found"
    (admin.lmx.home / "models" / "broken").mkdir()  # after the others: it is listed from now on
    (admin.lmx.home / "models" / "broken" / "config.json").write_text("{")
    broken = admin.post("/admin/models/load", {"model": "broken"}, 422)
    assert (broken["code"], "config.json" in broken["detail"]) == ("model_unusable", True)
    failed = admin.lmx.wait_event("admin_action_failed", model="broken")
    assert (failed["code"], failed["by"]) == ("model_unusable", "admin")
    assert admin.get("/admin/models/fit", 400)["code"] == "missing_field"
    assert admin.get("/admin/status?verbose=1", 400)["code"] == "invalid_value"
    assert admin.get("/admin/events?last=many", 400)["code"] == "invalid_value"
    assert admin.get("/admin/events?since=nan", 400)["code"] == "invalid_value"
    assert admin.get("/admin/nothing", 404)["code"] == "not_found"
    assert admin.get("/admin/models/load", 405)["code"] == "method_not_allowed"
    assert admin.get("/admin/crashes/none", 404)["code"] == "crash_not_found"


def routes() -> list[tuple[str, str]]:
    """The method and path of every admin route there is."""
    found = admin_routes(Forwarder(Path("/nowhere"), 1), CatalogView(), Traffic(), VitalsView(), Audit(None), Mock())
    return [(m, getattr(route, "path", "")) for route in found for m in getattr(route, "methods", ()) if m != "HEAD"]


async def test_no_route_is_open_without_the_key_and_every_one_is_documented(admin: Admin) -> None:
    inference = admin.lmx.cli("keys", "create", "--name", "bot").stdout.strip()
    async with httpx.AsyncClient(base_url=admin.lmx.url) as http:
        for method, path in routes():
            for key, status in (("", 401), ("wrong", 403), (inference, 403)):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                answer = await http.request(method, path, headers=headers)
                assert (answer.status_code, answer.json()["status"]) == (status, status), (method, path, key)
    page = (Path(__file__).parents[2] / "docs" / "admin.md").read_text()
    assert [f"{m} {path}" for m, path in routes() if f"| `{m} {path}` |" not in page] == []
    assert page.count("\n| `GET /") + page.count("\n| `POST /") == len(routes())


def test_a_bad_configuration_is_refused_in_words_and_a_good_one_is_in_force_without_touching_a_model(
    own_admin: Admin,
) -> None:
    admin = own_admin
    admin.post("/admin/models/load", {"model": "alpha"})
    pid, gateway = admin.lmx.model("alpha")["pid"], admin.get("/admin/status")["gateway"]["pid"]
    file = admin.lmx.home / "lmx.toml"
    file.write_text("[limits]\ninference_per_minute = 'few'\n")
    refused = admin.post("/admin/config/reload", status=400)
    assert (refused["code"], "inference_per_minute" in refused["detail"]) == ("invalid_config", True)
    assert admin.get("/admin/status")["gateway"]["pid"] == gateway
    file.write_text("[limits]\ninference_per_minute = 2\n")
    assert admin.post("/admin/config/reload")["status"] == "done"
    admin.lmx.wait_status(
        lambda doc: doc["gateway"]["pid"] not in {None, gateway} and doc["gateway"]["state"] == "ready"
    )
    body = chat("alpha", max_tokens=2, stream=False)
    for _ in deadline(20):  # the last of the old gateway's connections may still be answered by it
        answers = [httpx.post(f"{admin.lmx.url}/v1/chat/completions", json=body, timeout=60) for _ in range(3)]
        if answers[-1].status_code == 429:
            break
    assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"
    assert admin.lmx.model("alpha")["pid"] == pid


def test_a_crash_can_be_read_over_http(admin: Admin) -> None:
    loaded = admin.post("/admin/models/load", {"model": "alpha"})
    os.kill(loaded["new_pid"], signal.SIGABRT)
    admin.lmx.wait_event("process_exited", model="alpha")
    for _ in deadline(20):
        crashes = admin.get("/admin/crashes")["crashes"]
        if crashes:
            break
    assert (crashes[0]["model"], crashes[0]["signal"]) == ("alpha", "SIGABRT")
    crash = admin.get(f"/admin/crashes/{crashes[0]['id']}")["crash"]
    assert crash["id"] == crashes[0]["id"]
    assert "stderr" in crash
    restarts = {"model_name": "alpha", "exit_class": "native_crash"}
    admin.until_metric(1, "lmx_worker_restarts_total", **restarts)
    admin.lmx.wait_model("alpha")
    workers = admin.get("/admin/health")["checks"]["models"]["workers"]
    assert (workers["alpha"]["last_signal"], workers["alpha"]["restarts"]) == ("SIGABRT", 1)
    admin.post("/admin/models/unload", {"model": "alpha"})


def test_a_model_whose_canary_fails_is_never_ready_and_is_counted(admin: Admin) -> None:
    refused = admin.post("/admin/models/load", {"model": "gamma"}, 503)
    assert refused["code"] == "model_quarantined"
    admin.until_metric(1, "lmx_model_quarantines_total", model_name="gamma")
    assert admin.metric("lmx_canary_failures_total", model_name="gamma") >= 3
    assert admin.http.get("/readyz").status_code == 503
    assert admin.metric("lmx_model_state", model_name="gamma", state="quarantined") == 1
    health = admin.get("/admin/health")
    assert (health["status"], health["models_loaded"]) == ("degraded", 0)
    assert health["checks"]["models"]["workers"]["gamma"]["state"] == "quarantined"
    assert health["memory_usage_percent"] > 0
    assert health["checks"]["supervisor"]["latency_ms"] > 0
    admin.post("/admin/models/unload", {"model": "gamma"})


@contextmanager
def following(admin: Admin, query: str = "") -> Iterator[Callable[[Callable[[Any], bool]], Any]]:
    """Follow events; yields a function that waits for one."""
    seen: list[Any] = []
    news = threading.Condition()
    with admin.http.stream("GET", f"/admin/events{query}") as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        assert next(lines).startswith(":")

        def read() -> None:
            try:
                for line in lines:
                    if line.startswith("data: "):
                        with news:
                            seen.append(json.loads(line[6:]))
                            news.notify_all()
            except (httpx.HTTPError, httpx.StreamError):
                pass

        thread = threading.Thread(target=read, daemon=True)
        thread.start()

        def wait(condition: Callable[[Any], bool]) -> Any:
            with news:
                assert news.wait_for(lambda: any(map(condition, seen)), 60), (seen[-5:], admin.lmx.tail())
                return next(entry for entry in seen if condition(entry))

        yield wait
        # Only a shutdown wakes the thread that reads.
        answer.extensions["network_stream"].get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        thread.join(20)
    times = [entry["ts"] for entry in seen]
    assert times == sorted(set(times)), "an event was told twice, or out of turn"


def test_events_go_on_over_the_life_of_a_supervisor_and_without_one_models_serve_on(own_admin: Admin) -> None:
    admin = own_admin
    with following(admin) as wait:
        admin.post("/admin/models/load", {"model": "alpha"})
        wait(lambda e: e["event"] == "model_readiness_changed" and e["state"] == "ready")
        wait(lambda e: e["event"] == "admin_action" and e["by"] == "admin")
        admin.lmx.kill_supervisor()
        assert admin.post("/admin/models/unload", {"model": "alpha"}, 503)["code"] == "supervisor_unavailable"
        answer = admin.http.post("/v1/chat/completions", json=chat("alpha", max_tokens=4, stream=False))
        assert answer.status_code == 200
        admin.lmx.start()
        wait(lambda e: e["event"] == "process_adopted" and e["model"] == "alpha")
        admin.post("/admin/models/unload", {"model": "alpha"})
        wait(lambda e: e["event"] == "model_readiness_changed" and e["state"] == "stopped")
    with following(admin, "?last=1000") as wait:
        wait(lambda e: e["event"] == "model_readiness_changed" and e["state"] == "ready")
