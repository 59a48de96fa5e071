"""Every endpoint over a socket: its paths, its description, and whatever a client may send it."""

import asyncio
import json
import time
from typing import Any

import pytest

from protocol.control import CatalogModel
from protocol.data import Submit, Tokenized
from protocol.states import ModelState
from tests.bodykit import GOOD, bodies
from tests.e2e.gateway_harness import Stack, least, stack

BODIES = 400


async def send(lmx: Stack, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    answer = await lmx.client.post(path, content=json.dumps(body))
    return answer.status_code, answer.json()


@pytest.mark.parametrize("path", GOOD)
async def test_no_body_is_a_5xx(path: str) -> None:
    """The model is not there, so what passes every check is a 404."""
    statuses: dict[int, int] = {}
    async with stack() as lmx:
        lmx.supervisor.publish()
        assert (await send(lmx, path, {"model": "none", **GOOD[path]}))[0] == 404
        for body in bodies(path, BODIES):
            status, answer = await send(lmx, path, body)
            statuses[status] = statuses.get(status, 0) + 1
            assert status in {400, 404}, (body, answer)
            assert answer["error"].keys() == {"message", "type", "param", "code", "request_id"}
    # Both happened: the bodies are neither all hopeless nor all harmless.
    assert set(statuses) == {400, 404}
    assert min(statuses.values()) > BODIES // 20


async def test_every_path_has_variants() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        for path in ("/tokenize", "/v1/tokenize", "//v1//tokenize", "/v1/tokenize/", "//tokenize"):
            asking = lmx.client.build_request("POST", lmx.gateway.url + path, json={"model": "tiny", "prompt": "x"})
            sent = asyncio.create_task(lmx.client.send(asking))
            submit = await worker.receive(Submit)
            await worker.send(Tokenized(1, submit.rid, [1], "x"))
            assert (await sent).status_code == 200
        assert (await lmx.client.get("/v1/openapi.json")).status_code == 200
        assert (await lmx.client.post("/v2/tokenize", json={})).status_code == 404


async def test_it_describes_itself_at_once() -> None:
    async with stack() as lmx:
        first = await lmx.client.get("/openapi.json")

        async def again() -> float:
            started = time.monotonic()
            answer = await lmx.client.get("/openapi.json")
            took = time.monotonic() - started
            assert answer.json() == first.json()
            return took

        assert await least(again, 1.0) < 1.0
        assert first.json()["openapi"].startswith("3.1")
        for path, methods in first.json()["paths"].items():
            for method in methods:
                answer = await lmx.client.request(method, path.replace("{id}", "none"))
                if not answer.headers["content-type"].startswith("application/json"):
                    continue  # metrics are text
                code = answer.json().get("error", {}).get("code")
                assert code not in {"not_found", "method_not_allowed"}, path


async def test_models_are_listed_before_they_are_loaded() -> None:
    async with stack() as lmx:
        await lmx.start_worker("org/tiny")
        lmx.supervisor.publish(CatalogModel("idle", ModelState.STOPPED, 1_600_000_000, error_code="model_not_found"))
        await lmx.state("idle", ModelState.STOPPED)
        cards = {card["id"]: card for card in (await lmx.client.get("/v1/models")).json()["data"]}
        assert cards["idle"] == {
            "id": "idle",
            "object": "model",
            "created": 1_600_000_000,
            "owned_by": "lmx",
            "state": "stopped",
            "max_model_len": None,
            "capabilities": [],
        }
        ready = cards["org/tiny"]
        assert (ready["state"], ready["max_model_len"], ready["capabilities"]) == ("ready", 2048, ["chat"])
