"""Safe mode, quarantine, reset, resume and upgrade on real processes (workers without MLX)."""

import asyncio
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from tests.harness import Lmx, chat, deadline, read_stream

FAULT = {"LMX_WORKER__MODULE": "tests.fault"}


@pytest.fixture
def lmx(new_lmx: Callable[..., Lmx]) -> Lmx:
    return new_lmx(**FAULT)


def test_three_crashes_of_the_supervisor_within_a_minute_are_safe_mode_until_resume(lmx: Lmx, tiny_model: Path) -> None:
    lmx.start()
    lmx.load(tiny_model, "one")
    for _ in range(2):
        lmx.kill_everything()
        lmx.start()
    document = lmx.status()
    assert document is not None
    assert "3 starts" in document["supervisor"]["safe_mode"]
    assert document["models"] == []
    assert httpx.get(f"{lmx.url}/healthz").status_code == 200
    assert "SAFE MODE" in lmx.cli("status").stdout
    # By hand it goes on.
    lmx.load(tiny_model, "two")
    lmx.cli("resume")
    lmx.wait_model("one")
    assert lmx.model("two")["state"] == "ready"
    document = lmx.status()
    assert document is not None
    assert document["supervisor"]["safe_mode"] is None


def test_safe_mode_adopts_what_lives(lmx: Lmx, tiny_model: Path) -> None:
    lmx.start()
    lmx.load(tiny_model, "one")
    pid = lmx.model("one")["pid"]
    for _ in range(3):
        lmx.kill_supervisor()
        lmx.start(LMX_LIFECYCLE__ADOPT_S="30")
    document = lmx.wait_status(lambda doc: bool(doc["models"]) and doc["models"][0]["state"] == "ready")
    assert document["supervisor"]["safe_mode"]
    assert document["models"][0]["pid"] == pid


def test_a_model_set_aside_is_tried_again_by_itself_and_by_reset(lmx: Lmx, tiny_model: Path) -> None:
    lmx.environ["LMX_LIFECYCLE__PROBE_DELAYS_S"] = "[3.0, 600.0]"
    lmx.environ["LMX_FAULT"] = json.dumps({"models": ["bad"], "at": "loading", "deed": "abort"})
    lmx.start()
    assert lmx.cli("load", str(tiny_model), "--id", "bad", check=False).returncode == 1
    # In the journal: who asks for the status late sees the try already.
    aside = lmx.wait_event("model_readiness_changed", model="bad", state="quarantined")
    tried = lmx.wait_event("process_started", model="bad", incarnation=aside["incarnation"] + 1, degraded=True)
    assert tried["ts"] - aside["ts"] > 1
    lmx.wait_status(lambda doc: (doc["models"][0]["probe_in_s"] or 0) > 500)
    begun = lmx.model("bad")["incarnation"]
    assert "failures forgotten" in lmx.cli("reset", "bad").stdout
    lmx.wait_event("process_started", model="bad", incarnation=begun + 1, degraded=False)
    assert lmx.cli("reset", "none", check=False).returncode == 4


def test_the_third_try_runs_degraded_and_says_so(lmx: Lmx, tiny_model: Path) -> None:
    once = lmx.home / "twice"
    lmx.environ["LMX_FAULT"] = json.dumps({"at": "warming", "deed": "abort", "until_incarnation": 3})
    lmx.environ["LMX_LIFECYCLE__UNREADY_FAILURES"] = "9"
    lmx.environ["LMX_LIFECYCLE__BURST_FAILURES"] = "9"
    lmx.start()
    lmx.load(tiny_model, "one")
    model = lmx.model("one")
    assert (model["degraded"], model["state"], once.exists()) == (True, "ready", False)
    assert "degraded" in lmx.cli("status").stdout
    spec = json.loads(next((lmx.home / "run").glob(f"one-*.{model['incarnation']}.json")).read_text())
    assert spec["models"]["max_concurrent_requests"] == 1
    lmx.cli("restart-worker", "one")
    assert lmx.model("one")["degraded"] is False


def test_several_models_that_die_together_open_the_host_breaker(lmx: Lmx, tiny_model: Path) -> None:
    lmx.environ["LMX_LIFECYCLE__BREAKER_OPEN_S"] = "6"
    lmx.environ["LMX_LIFECYCLE__BREAKER_START_EVERY_S"] = "3"
    lmx.start()
    names = ["a", "b", "c", "d"]
    for name in names:
        lmx.load(tiny_model, name)
    for name in names:
        psutil.Process(lmx.model(name)["pid"]).kill()
    lmx.wait_status(lambda doc: doc["supervisor"]["host_breaker_open_s"])
    opened = lmx.wait_event("host_breaker_open")
    lmx.wait_status(lambda doc: all(m["state"] == "ready" for m in doc["models"]))
    starts = [e["ts"] for e in lmx.journal() if e["event"] == "process_started" and e["ts"] > opened["ts"]]
    # What is written down may be written up to a second after it was decided.
    rationed = [at for at in starts if at < opened["ts"] + 5]
    assert len(rationed) <= 3
    assert all(later - earlier > 2 for earlier, later in itertools.pairwise(rationed))


async def test_upgrade_replaces_supervisor_and_gateway_in_place_and_fails_no_request(
    lmx: Lmx, tiny_model: Path
) -> None:
    lmx.environ["LMX_FAULT"] = json.dumps({"tokens_per_s": 50, "answer_tokens": 150})
    lmx.start()
    lmx.load(tiny_model, "one")
    before = lmx.status()
    assert before is not None
    url, failures, stop = lmx.url, [], asyncio.Event()
    async with httpx.AsyncClient(base_url=url, timeout=30) as http:

        async def bot() -> int:
            count = 0
            while not stop.is_set():
                stream = await read_stream(http, chat("one", max_tokens=30, stream=True))
                count += 1
                if not stream.done:
                    failures.append((stream.status, stream.error, stream.broken))
            return count

        bots = [asyncio.create_task(bot()) for _ in range(4)]
        long = asyncio.create_task(read_stream(http, chat("one", max_tokens=150, stream=True)))
        await read_stream(http, chat("one", max_tokens=5, stream=True))
        done = await asyncio.to_thread(lmx.cli, "upgrade")
        result = await long
        stop.set()
        assert sum(await asyncio.gather(*bots)) >= 4
    assert failures == []
    assert result.done
    after = lmx.status()
    assert after is not None
    assert str(after["supervisor"]["pid"]) in done.stdout
    assert after["supervisor"]["pid"] == before["supervisor"]["pid"], "the same process: launchd notices nothing"
    assert after["supervisor"]["handed_over"]
    assert after["gateway"]["pid"] != before["gateway"]["pid"]
    assert after["models"][0]["pid"] == before["models"][0]["pid"]
    assert after["gateway"]["url"] == url
    lmx.wait_event("process_exited", pid=before["gateway"]["pid"])
    # The worker is still our child: its death has a status.
    worker = psutil.Process(after["models"][0]["pid"])
    worker.kill()
    assert lmx.wait_event("process_exited", pid=worker.pid)["signal"] == "SIGKILL"
    assert lmx.stop() == 0


async def test_a_gateway_that_a_killed_supervisor_had_told_to_drain_is_replaced(lmx: Lmx, tiny_model: Path) -> None:
    """The stop was begun and broken off; the next supervisor is to serve."""
    lmx.environ |= {"LMX_LIFECYCLE__DRAIN_S": "1", "LMX_FAULT": '{"tokens_per_s": 100}'}
    lmx.start()
    lmx.load(tiny_model, "one")
    gateway = (lmx.status() or {})["gateway"]["pid"]
    going = asyncio.Event()
    async with httpx.AsyncClient(base_url=lmx.url, timeout=60) as http:
        body = chat("one", max_tokens=4000, stream=True, text="[[tokens 4000]]")
        stream = asyncio.create_task(read_stream(http, body, lambda _: going.set()))
        await asyncio.wait_for(going.wait(), 60)
        assert lmx.process is not None
        lmx.process.terminate()
        log = lmx.home / "logs" / "gateway.log"
        for _ in deadline(30):
            if "gateway_draining" in log.read_text():
                break
        lmx.kill_supervisor()
        await asyncio.to_thread(lmx.start)
        await stream
    lmx.wait_status(lambda doc: doc["gateway"]["state"] == "ready" and doc["gateway"]["pid"] != gateway)
    async with httpx.AsyncClient(base_url=lmx.url, timeout=60) as http:
        assert (await read_stream(http, chat("one", max_tokens=5, stream=True))).done
