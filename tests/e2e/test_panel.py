"""`/ui`: a page that anybody may load, that holds nothing, and in which nothing but its own script can run."""

import base64
import hashlib
import re
from pathlib import Path

import pytest

from gateway.panel import Panel
from protocol.config import SecurityConfig
from tests.e2e.gateway_harness import stack
from tests.security.doorkit import DoorKit

PAGE = (Path(__file__).parents[2] / "gateway" / "panel.html").read_text()


def script() -> str:
    (found,) = re.findall(r"<script>(.*?)</script>", PAGE, re.DOTALL)
    return str(found)


async def test_it_comes_without_a_key_and_lets_nothing_else_run() -> None:
    security = SecurityConfig(profile="lan", inference_keys="required")
    async with stack(security=security) as lmx:
        answer = await lmx.client.get("/ui")
        assert (answer.status_code, answer.text) == (200, PAGE)
        policy = answer.headers["content-security-policy"]
        named = base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()
        assert f"script-src 'sha256-{named}'" in policy
        assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(policy.split("; "))
        assert "unsafe" not in policy
        assert (await lmx.client.head("/ui")).status_code == 200
        assert (await lmx.client.post("/ui")).status_code == 401
        assert (await lmx.client.get("/ui", headers={"host": "rebound.example"})).status_code == 421
        for route in re.findall(r'"(/(?:admin|ws)/[a-z-]+)', PAGE):
            assert (await lmx.client.get(route)).status_code in {401, 403, 404}, route


@pytest.mark.parametrize(("peer", "status"), [("10.1.1.1", 200), ("192.0.2.7", 403)])
async def test_it_comes_past_no_proxy(tmp_path: Path, peer: str, status: int) -> None:
    kit = DoorKit(tmp_path, profile="trusted-gateway", trusted_proxies=("10.0.0.0/8",))
    assert (await kit.ask("/ui", method="GET", peer=peer)).status == status


def test_it_needs_nothing_from_outside_and_shows_everything_as_text() -> None:
    assert not re.search(r"https?://|<link|<img|@import|url\(", PAGE)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|localStorage|cookie", script())
    assert not re.search(r"\son[a-z]+=|\sstyle=", PAGE)  # the policy would not let them work
    assert "/ws/audit-logs" in script()
    for name in ("model", "status", "backend_type", "client", "since", "until"):
        assert f'id="{name}"' in PAGE


def test_every_element_that_the_script_looks_for_is_there() -> None:
    wanted = set(re.findall(r'at\("([a-z]+)"\)', script()))
    assert wanted >= {"key", "rows", "older", "live"}
    assert all(f'id="{name}"' in PAGE for name in wanted)
    assert Panel()  # and its parts are found
