"""Rows of the failure matrix about what is installed, configured and allowed."""

import os
import signal
import time
from pathlib import Path

import httpx
import pytest

from tests.chaos.clients import OTHER
from tests.chaos.figures import Figure
from tests.chaos.test_rows_gateway import gateway_of, patched, pids, stage_of, undisturbed
from tests.harness import Lmx, chat

#: The next request makes the gateway keep 300 MB.
GROWING_PATCH = """
import os
from gateway.calls import Calls
kept = []
real = Calls.admit
def admit(self):
    if os.path.exists(f"{HERE}/grow"):
        os.unlink(f"{HERE}/grow")
        kept.append(b"x" * 300_000_000)
    return real(self)
Calls.admit = admit
"""


def test_row_42_gateway_that_grows(tiny_model: Path, tmp_path: Path, figure: Figure) -> None:
    site = tmp_path / "site"
    with stage_of(
        tiny_model, **patched(site, gateway=GROWING_PATCH), LMX_MEMORY__GATEWAY_LIMIT_BYTES="200000000"
    ) as stage:
        lmx = stage.lmx
        lmx.load(tiny_model, OTHER)
        before, gateway = pids(lmx), gateway_of(lmx)
        with undisturbed(lmx):
            (site / "grow").touch()
            began = time.monotonic()
            lmx.wait_event("gateway_grown", pid=gateway["pid"])
            lmx.wait_status(lambda doc: doc["gateway"]["pid"] not in {0, None, gateway["pid"]})
            lmx.wait_status(lambda doc: doc["gateway"]["state"] == "ready")
            figure("row 42", "replaced after it has grown", time.monotonic() - began, target=5.0)
        assert pids(lmx) == before
        lmx.wait_status(lambda doc: 0 < (doc["gateway"]["memory_bytes"] or 0) < 200_000_000)


def test_row_68_bad_configuration_on_reload(tiny_model: Path, figure: Figure) -> None:
    with stage_of(tiny_model) as stage:
        lmx = stage.lmx
        lmx.load(tiny_model, OTHER)
        assert lmx.process is not None
        before, gateway = pids(lmx), gateway_of(lmx)
        with undisturbed(lmx):
            (lmx.home / "lmx.toml").write_text("[gateway]\n\nmax_held = 'many'\n")
            began = time.monotonic()
            os.kill(lmx.process.pid, signal.SIGHUP)
            rejected = lmx.wait_event("config_rejected")
            figure("row 68", "rejected with words", time.monotonic() - began, target=1.0)
            assert "lmx.toml:3" in rejected["reason"]
            assert (pids(lmx), gateway_of(lmx)["pid"]) == (before, gateway["pid"])
            assert not [entry for entry in lmx.journal() if entry["event"] == "supervisor_handover"]
            # And a good one is taken, by replacing supervisor and gateway in place.
            (lmx.home / "lmx.toml").write_text("[gateway]\nmax_held = 7\n")
            os.kill(lmx.process.pid, signal.SIGHUP)
            lmx.wait_event("supervisor_handover")
            lmx.wait_status(lambda doc: doc["gateway"]["pid"] not in {0, None, gateway["pid"]})
            lmx.wait_status(lambda doc: doc["gateway"]["state"] == "ready" and doc["models"][0]["state"] == "ready")
        assert pids(lmx) == before, "no model was reloaded"


def test_row_71_versions_of_mlx_that_are_not_used(tiny_model: Path, tmp_path: Path, figure: Figure) -> None:
    fake = tmp_path / "mlx-0.31.2.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx\nVersion: 0.31.2\n")
    path = os.pathsep.join(part for part in (str(tmp_path), os.environ.get("PYTHONPATH", "")) if part)
    lmx = Lmx(PYTHONPATH=path).start()
    try:
        began = time.monotonic()
        done = lmx.cli("load", str(tiny_model), "--id", "old", check=False)
        figure("row 71", "refused with words", time.monotonic() - began, target=2.0)
        assert done.returncode == 1
        assert "MLX 0.31.2 is not used" in done.stderr
        assert sum(entry["event"] == "process_started" and entry.get("model") == "old" for entry in lmx.journal()) == 1
        answer = httpx.post(f"{lmx.url}/v1/chat/completions", json=chat("old", max_tokens=1, stream=False), timeout=30)
        assert answer.status_code in {404, 503}
    finally:
        lmx.close()


@pytest.fixture(scope="module")
def closed(tiny_model: Path) -> Lmx:
    """An LMX that wants a key for everything but health."""
    lmx = Lmx(LMX_WORKER__MODULE="tests.fault", LMX_SECURITY__INFERENCE_KEYS="required").start()
    lmx.load(tiny_model, OTHER)
    yield lmx
    lmx.close()


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"Bearer lmx-wrong")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Basic bG14OmxteA==")],
        [(b"authorization", "Bearer lmx-schlüssel".encode())],
        [(b"authorization", b"Bearer \xff\xfe")],
        [(b"x-api-key", b"lmx-" + b"a" * 4000)],
        [(b"authorization", b"Bearer lmx-a"), (b"authorization", b"Bearer lmx-b")],
        [(b"authorization", b"Bearer lmx-a"), (b"x-api-key", b"lmx-b")],
    ],
    ids=["none", "wrong", "empty", "basic", "umlaut", "bytes", "long", "twice", "both"],
)
def test_row_80_keys_that_are_missing_wrong_or_odd(closed: Lmx, headers: list[tuple[bytes, bytes]]) -> None:
    with httpx.Client(base_url=closed.url, timeout=20) as http:
        answer = http.post("/v1/chat/completions", json=chat(OTHER, max_tokens=1, stream=False), headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/healthz").status_code == 200


def test_row_80_the_right_key_passes(closed: Lmx) -> None:
    made = closed.cli("keys", "create", "--name", "bot", "--json").stdout
    key = httpx.Response(200, text=made).json()["key"]
    headers = {"authorization": f"Bearer {key}"}
    body = chat(OTHER, max_tokens=1, stream=False)
    answer = httpx.post(f"{closed.url}/v1/chat/completions", json=body, headers=headers, timeout=20)
    assert answer.status_code == 200
