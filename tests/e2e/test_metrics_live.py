"""Metrics of a real gateway (workers and supervisor in the test), and what health says of them."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import yaml
from prometheus_client.parser import text_string_to_metric_families

from gateway.exposition import HISTOGRAMS
from gateway.numbers import ModelNumbers
from protocol.control import Catalog, Ping
from protocol.data import Finish
from protocol.errors import ERRORS
from protocol.keys import digest_of
from tests.e2e.gateway_harness import PATIENCE_S, Stack, chat_body, stack

DEPLOY = Path(__file__).parents[2] / "deploy"
ADMIN = "an-admin-key-of-the-tests"
Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


def status(used: float = 0.5, **more: Any) -> bytes:
    """What the supervisor says once a second."""
    document: dict[str, Any] = {
        "schema": "lmx.status/1",
        "supervisor": {"uptime_s": 7.5, "safe_mode": None, "internal_errors": 2},
        "memory": {"total_bytes": 1000, "available_bytes": 500, "machine_used_share": used, "shed_share": 0.95},
        "models": [{"id": "tiny", "memory_bytes": 123, "limit_bytes": 456, "concurrent_limit": 5}],
        "counters": [
            {"name": "worker_restarts", "model": "tiny", "kind": "native_crash", "value": 3},
            {"name": "quarantines", "model": "tiny", "kind": "", "value": 1},
            {"name": "of a later version", "model": "tiny", "kind": "", "value": 1},
        ],
        **more,
    }
    return msgspec.json.encode(document)


def tell(lmx: Stack, document: bytes) -> None:
    """Have the supervisor say so now, and again with each heartbeat: what it said ten seconds ago does not count."""
    lmx.supervisor.status = document
    lmx.supervisor.send(Ping(document))


async def scraped(lmx: Stack) -> Values:
    answer = await lmx.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


async def value(lmx: Stack, name: str, **labels: str) -> float:
    return (await scraped(lmx)).get((name, frozenset(labels.items())), -1.0)


async def until_value(lmx: Stack, wanted: float, name: str, **labels: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await value(lmx, name, **labels) != wanted:  # noqa: ASYNC110 - the other process sends no event
            await asyncio.sleep(0.02)


async def test_requests_tokens_and_times_are_counted_for_each_model_and_both_forms_agree() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        request = lmx.client.build_request("POST", "/v1/chat/completions", json=chat_body(stream=True))
        sending = asyncio.create_task(lmx.client.send(request, stream=True))
        submit = await worker.accept()
        answer = await sending
        lines = answer.aiter_lines()
        for text in ("a", "b", "c"):
            await worker.step(submit.rid, text)
            while f'"content":"{text}"' not in await anext(lines):
                pass
            await asyncio.sleep(0.02)  # what is measured is time, from when the gateway had this one
        await worker.step(submit.rid, "d", finish=Finish.STOP, tokens=4)
        assert [line async for line in lines if line][-1] == "data: [DONE]"
        await answer.aclose()
        whole = lmx.chat()
        await worker.answer("x", finish=Finish.LENGTH)
        assert (await whole).status_code == 200
        broken = lmx.chat(on_crash="x", temperature=9)
        assert (await broken).status_code == 400
        found = await scraped(lmx)
        tiny = {"model_name": "tiny"}

        def of(name: str, **labels: str) -> float:
            return found[name, frozenset((tiny | labels).items())]

        assert (of("lmx_prompt_tokens_total"), of("lmx_generation_tokens_total")) == (14, 5)
        assert (of("lmx_prefix_cache_hits_total"), of("lmx_prefix_cache_queries_total")) == (6, 14)
        assert of("lmx_request_success_total", finished_reason="stop") == 1
        assert of("lmx_request_success_total", finished_reason="length") == 1
        assert of("lmx_time_to_first_token_seconds_count") == of("lmx_e2e_request_latency_seconds_count") == 2
        assert of("lmx_inter_token_latency_seconds_count") == 3
        assert 0.06 <= of("lmx_inter_token_latency_seconds_sum") < PATIENCE_S
        assert of("lmx_inter_token_latency_seconds_bucket", le="0.01") == 0
        assert of("lmx_request_generation_tokens_bucket", le="1.0") == 1
        assert found["lmx_errors_total", frozenset({("code", "invalid_value")})] == 1
        chat = {("route", "/chat/completions"), ("status", "200")}
        assert found["lmx_http_responses_total", frozenset(chat)] == 2
        for name in ("lmx_time_to_first_token_seconds", "lmx_inter_token_latency_seconds"):
            buckets = [n for (each, _), n in found.items() if each == f"{name}_bucket"]
            assert buckets == sorted(buckets)
            assert buckets[-1] == of(f"{name}_count")
        # The same as JSON; only what changes by itself may differ.
        answer = await lmx.client.get("/metrics?format=json")
        document = answer.json()
        assert (document["schema"], document["metrics"][0]["type"]) == ("lmx.metrics/1", "histogram")
        samples = {
            (s["name"], frozenset(s["labels"].items())): s["value"] for m in document["metrics"] for s in m["samples"]
        }
        assert samples.keys() == found.keys() | {
            ("lmx_http_responses_total", frozenset({("route", "/metrics"), ("status", "200")}))
        }
        same = {key: n for key, n in found.items() if "lmx_http" not in key[0] and "connections" not in key[0]}
        assert {key: samples[key] for key in same} == same


async def test_the_queue_is_the_real_one() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        running = lmx.chat()
        submit = await worker.accept()
        await until_value(lmx, 1, "lmx_num_requests_running", model_name="tiny")
        waiting = [lmx.chat() for _ in range(3)]  # submitted, and not accepted: the worker has no slot for them
        await until_value(lmx, 3, "lmx_queued_requests")
        assert await value(lmx, "lmx_num_requests_running", model_name="tiny") == 1
        assert await value(lmx, "lmx_num_requests_waiting", model_name="tiny") == 3
        assert await value(lmx, "lmx_concurrent_limit", model_name="tiny") == 32
        await worker.step(submit.rid, "x", finish=Finish.STOP)
        for _ in waiting:
            await worker.answer("x")
        assert {answer.status_code for answer in await asyncio.gather(running, *waiting)} == {200}
        assert await value(lmx, "lmx_queued_requests") == 0


async def test_labels_are_bounded_whatever_clients_say() -> None:
    async with stack(admin_digest=digest_of(ADMIN.encode()).hex()) as lmx:
        await lmx.start_worker()
        await lmx.chat(model="unknown-0")
        before = len(await scraped(lmx))
        for number in range(30):
            await lmx.chat(model=f"unknown-{number}")
            await lmx.client.get(f"/nowhere/{number}")
            await lmx.client.get(f"/v1/models/unknown-{number}")
            await lmx.client.get(f"/admin/models/{number}", headers={"authorization": f"Bearer {ADMIN}"})
        found = await scraped(lmx)
        assert len(found) - before < 10
        assert "unknown" not in str(found)


async def test_what_the_supervisor_says_is_in_the_metrics_and_readiness_and_fades_when_it_is_away() -> None:
    async with stack() as lmx:
        await lmx.start_worker()
        tell(lmx, status())
        await until_value(lmx, 3, "lmx_worker_restarts_total", model_name="tiny", exit_class="native_crash")
        found = await scraped(lmx)
        tiny = frozenset({("model_name", "tiny")})
        assert found["lmx_model_quarantines_total", tiny] == 1
        assert found["lmx_canary_failures_total", tiny] == 0  # there from the first on, for a rate
        assert found["lmx_worker_memory_bytes", tiny] == 123
        assert found["lmx_concurrent_limit", tiny] == 5
        assert found["lmx_supervisor_internal_errors_total", frozenset()] == 2
        assert found["lmx_model_state", tiny | {("state", "ready")}] == 1
        assert found["lmx_model_state", tiny | {("state", "loading")}] == 0
        ready = await lmx.client.get("/readyz")
        assert (ready.status_code, ready.json()["memory_percent"]) == (200, 50.0)
        tell(lmx, status(used=0.961))
        await until_value(lmx, 0.961, "lmx_memory_used_ratio")
        ready = await lmx.client.get("/readyz")
        assert (ready.status_code, ready.json()["reason"]) == (503, "memory at 96.1%")
        assert (await lmx.client.get("/healthz")).status_code == 200
        tell(lmx, b"not json")
        tell(lmx, status(used=0.4))
        await until_value(lmx, 0.4, "lmx_memory_used_ratio")
        assert (await lmx.client.get("/readyz")).status_code == 200
        lmx.supervisor.send(Catalog(999, lmx.supervisor.models, shedding=True))
        await until_value(lmx, 1, "lmx_memory_shedding")
        assert (await lmx.client.get("/readyz")).status_code == 503
        shed = await lmx.chat()
        assert (shed.status_code, shed.json()["error"]["code"]) == (503, "load_shedding")
        assert await value(lmx, "lmx_shed_requests_total", code="load_shedding") == 1


async def test_health_without_an_answer_of_the_supervisor_is_degraded_and_still_says_what_is_known() -> None:
    async with stack(admin_digest=digest_of(ADMIN.encode()).hex()) as lmx:
        await lmx.start_worker()
        tell(lmx, status())
        await until_value(lmx, 0.5, "lmx_memory_used_ratio")
        answers = [
            await lmx.client.get("/admin/health", headers={"authorization": f"Bearer {key}"}) for key in (ADMIN, "x")
        ]
        assert [answer.status_code for answer in answers] == [200, 403]
        health = answers[0].json()
        assert (health["status"], health["memory_usage_percent"], health["models_loaded"]) == ("degraded", 50.0, 1)
        assert "supervisor" in health["reason"]
        assert all("status" in check and "latency_ms" in check for check in health["checks"].values())


def names_in(expression: str) -> set[str]:
    """Every name in an expression that is no function, word, label or number, however it is spelled."""
    plain = re.sub(r"^label_values\((\w+), *\w+\)$", r"\1", expression)
    plain = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|without|on|ignoring)\s*\([^)]*\)", " ", plain)
    found = set(re.findall(r"(?<![\w:.])[A-Za-z_:][\w:]*(?![\w:]|\s*\()", plain))
    return found - {"and", "or", "unless", "bool", "offset", "up", "prometheus"}


def rules_deployed() -> Iterator[dict[str, Any]]:
    for file in sorted((DEPLOY / "prometheus").glob("*.yml")):
        for group in yaml.safe_load(file.read_text()).get("groups", ()):
            yield from group["rules"]


def expressions() -> Iterator[str]:
    """Every expression in the files that are deployed."""
    yield from (rule["expr"] for rule in rules_deployed())
    dashboard = json.loads((DEPLOY / "grafana" / "lmx.json").read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (each["query"] for each in dashboard["templating"]["list"])


async def test_every_metric_that_dashboard_and_rules_use_is_in_the_exposition() -> None:
    async with stack() as lmx:
        text = (await lmx.client.get("/metrics")).text
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    helps = re.findall(r"^# HELP (\S+) \S", text, re.MULTILINE)
    assert sorted(helps) == sorted(kinds)
    given = {name for name, kind in kinds.items() if kind != "histogram"}
    ends = ("bucket", "sum", "count")
    given |= {f"{name}_{end}" for name, kind in kinds.items() if kind == "histogram" for end in ends}
    used = {name for expression in expressions() for name in names_in(expression) if not name.startswith("lmx:")}
    assert len(used) > 40
    assert used - given == set()
    # Series that rules record are used under the name they are given.
    rules = list(rules_deployed())
    recorded = {rule["record"] for rule in rules if "record" in rule}
    assert {name for rule in rules for name in names_in(rule["expr"]) if ":" in name} <= recorded
    assert names_in('sum by (le) (rate(a{b="c"}[5m])) / clamp_min(e_f:g, 1e-9) > 2 and up{h="i"} == 1') == {
        "a",
        "e_f:g",
    }
    # A bucket that is asked for by its end has to be one.
    asked = {
        (name, end) for text in expressions() for name, end in re.findall(r'(\w+)_bucket\{[^}]*\ble="([^"]+)"', text)
    }
    assert ("lmx_time_to_first_token_seconds", "0.5") in asked
    buckets = {row.name: {str(float(bound)) for bound in row.of(ModelNumbers()).bounds} for row in HISTOGRAMS}
    assert [each for each in asked if each[1] not in buckets[each[0]]] == []
    assert all(rule["annotations"]["summary"] and rule["annotations"]["runbook"] for rule in rules if "alert" in rule)
    page = (DEPLOY.parent / "docs" / "metrics.md").read_text()
    assert [name for name in kinds if f"| `{name}` |" not in page] == []
    assert set(re.findall(r"^\| `(lmx_\w+)` \|", page, re.MULTILINE)) == kinds.keys()


def selects(matchers: str, labels: dict[str, str]) -> bool:
    """Whether Prometheus's `name="value"`, `!=`, `=~`, `!~`, with commas between them, fit."""
    for name, how, wanted in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', matchers):
        value = labels.get(name, "")
        fits = re.fullmatch(wanted, value) is not None if "~" in how else value == wanted
        if fits is how.startswith("!"):
            return False
    return True


async def test_what_rules_take_the_increase_of_is_there_before_it_first_happens() -> None:
    async with stack() as lmx:
        tell(lmx, status(counters=[]))
        await lmx.start_worker()
        await until_value(lmx, 123, "lmx_worker_memory_bytes", model_name="tiny")
        there = await scraped(lmx)
    asked = {
        found
        for rule in rules_deployed()
        for found in re.findall(r"(?:increase|rate)\((\w+?_total)(\{[^}]*\})?\[", rule["expr"])
        # What has too many possible labels counts by its value until it has a past.
        if f"unless {found[0]} offset" not in rule["expr"] and "generation_tokens" not in rule.get("record", "")
    }
    assert ("lmx_errors_total", '{code="internal_error"}') in asked
    for metric, matchers in asked:
        zeros = [value for (name, labels), value in there.items() if name == metric and selects(matchers, dict(labels))]
        assert zeros, (metric, matchers)
        assert not any(zeros) or metric == "lmx_supervisor_internal_errors_total"


def test_the_objective_counts_every_failure_that_is_ours_and_none_that_is_the_clients() -> None:
    rules = [rule["expr"] for rule in rules_deployed() if "request_errors" in rule.get("record", "")]
    assert len(rules) == 2
    for text in rules:
        (matchers,) = re.findall(r"lmx_request_failures_total\{([^}]*)\}", text)
        counted = {code for code in ERRORS if selects(matchers, {"code": code})}
        assert counted == {code for code, row in ERRORS.items() if row.type == "server_error" or code == "server_busy"}


async def test_a_scrape_does_not_need_a_supervisor() -> None:
    async with stack() as lmx:
        await lmx.start_worker()
        await lmx.supervisor.close()
        try:
            answer = await lmx.client.get("/metrics", headers={"accept": "application/json"})
            assert answer.json()["schema"] == "lmx.metrics/1"
            refused = await lmx.client.get("/metrics?format=xml")
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value")
            assert (await lmx.client.head("/metrics")).status_code == httpx.codes.OK
        finally:
            lmx.supervisor = type(lmx.supervisor)(lmx.home / "s.sock", lmx.lifecycle.lease_s)
