"""The OpenAPI document and the page of parameters say what the code does."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from gateway.app import Parts, build_app
from gateway.audit import Audit
from gateway.catalog import CatalogView
from gateway.context import is_admin_path
from gateway.numbers import Numbers
from gateway.openapi import OPERATIONS, document
from gateway.traffic import Traffic
from gateway.vitals import VitalsView
from protocol.config import GatewayConfig, LifecycleConfig
from protocol.spec import GatewaySpec

REPOSITORY = Path(__file__).resolve().parents[2]


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_every_reference_leads_somewhere_and_every_schema_is_used() -> None:
    made = document()
    names = {reference.removeprefix("#/components/schemas/") for reference in references(made)}
    assert names == made["components"]["schemas"].keys()


def test_what_a_stream_sends_is_described_event_by_event() -> None:
    post = document()["paths"]["/v1/chat/completions"]["post"]
    data = post["responses"]["200"]["content"]["text/event-stream"]["schema"]["properties"]["data"]
    assert data["anyOf"][0] == {"const": "[DONE]"}
    chunk = {"$ref": "#/components/schemas/ChatCompletionChunk"}
    assert chunk in data["anyOf"][1]["contentSchema"]["anyOf"]


async def test_every_route_of_clients_is_described_and_nothing_else() -> None:
    """Those of administrators are in docs/admin.md."""
    spec = GatewaySpec(1, 0, "", "", "INFO", GatewayConfig(), LifecycleConfig())
    parts = Parts(CatalogView(), Mock(), Traffic(), Numbers(), VitalsView(), Mock(), Audit(None))
    app: Any = build_app(spec, parts)
    assert isinstance(app, Starlette)
    routes = {
        (method.lower(), re.sub(r":path", "", route.path))
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or ())
        if method != "HEAD" and not is_admin_path(route.path)
    }
    described = {(operation.method, operation.path.removeprefix("/v1")) for operation in OPERATIONS}
    assert routes == described | {("get", "/openapi.json"), ("get", "/ui")}


@pytest.mark.parametrize("name", ["ChatRequest", "CompletionRequest"])
def test_bounds_and_refusals_are_in_the_schema(name: str) -> None:
    properties = document()["components"]["schemas"][name]["properties"]
    assert (properties["temperature"]["minimum"], properties["temperature"]["maximum"]) == (0, 2)
    assert properties["user"] == {"description": "Accepted without effect."}
    assert properties["n"]["maximum"] == 16
    refused = "audio" if name == "ChatRequest" else "suffix"
    assert properties[refused]["enum"][0] is None


def test_the_page_of_parameters_is_up_to_date() -> None:
    """It also fails when OpenAI's client has learnt a parameter that no table here knows."""
    done = subprocess.run(
        [sys.executable, "scripts/api-table", "--check"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
