"""Memory, with real processes: what is predicted, refused, unloaded for others, and replaced because it grew."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from supervisor.prediction import BASE_BYTES
from tests.chaos.clients import Call
from tests.fault.pipe import Pipe
from tests.harness import Lmx, chat, deadline

MIB = 1024**2
TOTAL = psutil.virtual_memory().total
#: The machine may be nearly full of other things; here only the ledger's own sums count.
CALM = {"LMX_MEMORY__SHED": "2", "LMX_MEMORY__CRITICAL": "2"}
FAULT = {**CALM, "LMX_WORKER__MODULE": "tests.fault", "LMX_MEMORY__KV_TOKENS": "0"}


#: Memory that nobody shares: a footprint is the smaller, the more processes of the machine map the same libraries.
BALLAST: dict[str, Any] = {"ballast_mb": 200}


def budget(mib: int) -> dict[str, str]:
    """Leave so much for models."""
    return {"LMX_MEMORY__RESERVE_BYTES": str(TOTAL - mib * MIB), "LMX_MEMORY__FRACTION": "1"}


@pytest.fixture
def folders(tiny_model: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Make a folder per model: what one showed is not known of another."""

    def folder(name: str) -> Path:
        made = tmp_path / name
        if not made.exists():
            shutil.copytree(tiny_model, made)
        return made

    return folder


def fit(lmx: Lmx, folder: Path, *more: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(lmx.cli("fit", str(folder), "--json", *more, check=False).stdout)
    return document


def loaded(lmx: Lmx) -> list[str]:
    document = lmx.status()
    assert document is not None
    return [model["id"] for model in document["models"]]


def ask(lmx: Lmx, model: str, text: str = "Hello", **more: Any) -> Call:
    return Call(lmx.url, chat(model, text=text, **{"max_tokens": 3, "stream": False, **more}), {})


def weighed(document: dict[str, Any]) -> bool:
    """Whether the first sample after each load has been taken: until then a model claims what was predicted."""
    return all((model["memory_bytes"] or 0) > BALLAST["ballast_mb"] * MIB for model in document["models"])


def off_by(lmx: Lmx, model: str) -> float:
    return abs(float(lmx.wait_event("memory_measured", model=model)["off_by"]))


def test_the_prediction_for_a_tiny_model_is_within_15_percent(new_lmx: Callable[..., Lmx], tiny_model: Path) -> None:
    lmx = new_lmx(**CALM).start()
    asked = fit(lmx, tiny_model)
    assert (asked["schema"], asked["fits"], asked["loadable"], asked["would_evict"]) == ("lmx.fit/1", True, True, [])
    assert asked["need_bytes"] > BASE_BYTES
    assert loaded(lmx) == [], "asked without loading"
    lmx.load(tiny_model, "tiny")
    assert off_by(lmx, "tiny") < 0.15
    model = lmx.model("tiny")
    assert abs(model["memory_bytes"] / model["predicted_bytes"] - 1) < 0.15
    assert model["limit_bytes"] > model["need_bytes"] >= model["predicted_bytes"]
    lmx.load(tiny_model, "again")
    assert off_by(lmx, "again") < 0.05, "the second time it is known"
    text = lmx.cli("status").stdout
    assert "PREDICTED" in text
    assert "used, " in text
    assert "reserved of" in text


@pytest.mark.real_model
def test_the_prediction_for_the_default_model_is_within_15_percent(
    new_lmx: Callable[..., Lmx], real_model: Path
) -> None:
    lmx = new_lmx(**CALM).start()
    lmx.load(real_model, "real")
    assert off_by(lmx, "real") < 0.15


def test_what_does_not_fit_is_refused_with_words_and_leaves_no_trace(
    new_lmx: Callable[..., Lmx], folders: Callable[[str], Path]
) -> None:
    lmx = new_lmx(**FAULT, **budget(66)).start()
    lmx.cli("load", str(folders("kept")), "--pin")
    asked = fit(lmx, folders("more"))
    assert not asked["fits"]
    assert (asked["loadable"], asked["must_go"], asked["would_evict"]) == (False, ["kept"], [])
    assert 0 < asked["available_bytes"] < asked["need_bytes"]
    assert lmx.cli("fit", str(folders("more")), check=False).returncode == 1
    refused = lmx.cli("load", str(folders("more")), check=False)
    assert refused.returncode == 1
    for words in ("insufficient_memory: more needs 54 MiB and ", " are available; unload first: kept"):
        assert words in refused.stderr
    assert loaded(lmx) == ["kept"]
    assert lmx.cli("unpin", "kept").returncode == 0
    assert fit(lmx, folders("more"))["would_evict"] == ["kept"]
    lmx.cli("load", str(folders("more")))
    assert loaded(lmx) == ["more"]
    gone = ask(lmx, "kept").wait()
    assert (gone.status, gone.code) == (404, "model_not_found")
    # It is gone for good: an operator loaded another in its place.
    lmx.stop()
    lmx.start()
    lmx.wait_model("more")
    assert loaded(lmx) == ["more"]


def test_the_least_recently_used_idle_model_goes_and_loads_do_not_thrash(
    new_lmx: Callable[..., Lmx], folders: Callable[[str], Path]
) -> None:
    seldom = {"LMX_MEMORY__ROTATE": "0", "LMX_MEMORY__EVICT_EVERY_S": "300"}
    lmx = new_lmx(**FAULT, **budget(400), **seldom, LMX_FAULT=json.dumps(BALLAST)).start()
    for name in ("one", "two"):
        lmx.cli("load", str(folders(name)))
    used = ask(lmx, "one").wait()
    assert used.status == 200
    lmx.wait_status(lambda doc: doc["models"][0]["idle_s"] < doc["models"][1]["idle_s"] and weighed(doc))
    lmx.cli("load", str(folders("three")))
    assert sorted(loaded(lmx)) == ["one", "three"]
    assert lmx.wait_event("model_evicted", model="two")["reason"] == "to make room for three"
    damped = lmx.cli("load", str(folders("two")), check=False)
    assert damped.returncode == 1
    assert "a model was unloaded for another just now" in damped.stderr


def test_a_model_with_a_request_in_flight_is_never_evicted(
    new_lmx: Callable[..., Lmx], folders: Callable[[str], Path], tmp_path: Path
) -> None:
    with Pipe(tmp_path / "steps") as steps:
        lmx = new_lmx(**FAULT, **budget(66), LMX_FAULT=json.dumps({"step_pipe": str(steps.file)})).start()
        lmx.cli("load", str(folders("busy")), "--ttl", "5")
        call = ask(lmx, "busy", stream=True)
        steps.let(2)  # the prefill and the first of three tokens
        call.wait_chunks(1)
        begun = time.monotonic()
        lmx.wait_status(lambda doc: doc["models"][0]["running"] == 1)
        refused = lmx.cli("load", str(folders("more")), check=False)
        assert refused.returncode == 1
        assert "unload first: busy" in refused.stderr
        # Longer than its time.
        lmx.wait_status(lambda doc: doc["models"][0]["running"] == 1 and time.monotonic() > begun + 6)
        released_at = time.time()
        steps.let(2)
        assert call.wait().whole
        # Its own time counts from the end of the request.
        gone = lmx.wait_event("model_evicted", model="busy")
        assert gone["ts"] - released_at > 3
        assert "nobody used it" in gone["reason"]
        lmx.wait_status(lambda doc: doc["models"] == [])


def test_a_request_that_has_just_begun_keeps_its_model_too(
    new_lmx: Callable[..., Lmx], folders: Callable[[str], Path], tmp_path: Path
) -> None:
    # The ballast alone would close the model as soon as its footprint is known.
    full = {"LMX_MEMORY__SOFT": "1", "LMX_MEMORY__HARD": "1", "LMX_MEMORY__ROTATE": "0"}
    # So seldom that the supervisor would hear of the request only after the load. So does the gateway.
    seldom = {"LMX_LIFECYCLE__HEARTBEAT_S": "30", "LMX_LIFECYCLE__HEARTBEAT_LATE_S": "90"}
    seldom |= {"LMX_LIFECYCLE__HEARTBEAT_HUNG_S": "100", "LMX_LIFECYCLE__GATEWAY_HUNG_S": "200"}
    seldom |= {"LMX_LIFECYCLE__PREFILL_S": "100", "LMX_LIFECYCLE__DECODE_S": "100"}
    with Pipe(tmp_path / "steps") as steps:
        fault = {"step_pipe": str(steps.file), **BALLAST}
        lmx = new_lmx(**FAULT, **budget(250), **full, **seldom, LMX_FAULT=json.dumps(fault)).start()
        lmx.cli("load", str(folders("busy")))
        lmx.wait_status(weighed)
        folder = folders("more")
        call = ask(lmx, "busy", stream=True)
        steps.let(2)
        call.wait_chunks(1)
        refused = lmx.cli("load", str(folder), check=False)
        assert refused.returncode == 1
        assert "unload first: busy" in refused.stderr
        steps.let(2)
        assert call.wait().whole


def test_a_pinned_model_outlives_its_time(new_lmx: Callable[..., Lmx], folders: Callable[[str], Path]) -> None:
    lmx = new_lmx(**FAULT, LMX_MEMORY__TTL_S="1", LMX_MEMORY__PINNED="by-config").start()
    lmx.cli("load", str(folders("by-config")))
    lmx.cli("load", str(folders("by-hand")), "--pin")
    lmx.cli("load", str(folders("goes")))
    lmx.wait_event("model_evicted", model="goes")
    lmx.wait_status(lambda doc: {"goes"}.isdisjoint(model["id"] for model in doc["models"]))
    lmx.wait_status(lambda doc: all(m["idle_s"] > 2 for m in doc["models"]))
    assert loaded(lmx) == ["by-config", "by-hand"]
    assert "stays pinned by the configuration" in lmx.cli("unpin", "by-config").stdout
    lmx.cli("unpin", "by-hand")
    lmx.wait_event("model_evicted", model="by-hand")
    assert lmx.cli("pin", "nobody", check=False).returncode == 4


def test_what_was_live_and_does_not_fit_any_more_waits_in_words(
    new_lmx: Callable[..., Lmx], folders: Callable[[str], Path]
) -> None:
    lmx = new_lmx(**FAULT, **budget(130)).start()
    for name in ("one", "two"):
        lmx.cli("load", str(folders(name)))
    lmx.stop()
    (lmx.home / "state" / "memory").unlink(missing_ok=True)  # as before the first run
    lmx.start(**budget(66))
    lmx.wait_model("one")
    lmx.wait_status(lambda doc: bool(doc["models"][1]["blocked"]))
    assert "INSUFFICIENT MEMORY: needs " in lmx.cli("status", check=False).stdout
    waiting = ask(lmx, "two").wait()
    assert (waiting.status, waiting.code) == (503, "insufficient_memory")
    assert ask(lmx, "one").wait().status == 200
    lmx.cli("unload", "one")
    lmx.wait_model("two")
    for _ in deadline(30):  # until the gateway has heard of it, too
        answer = ask(lmx, "two").wait()
        if answer.status == 200:
            break
    assert answer.status == 200
    assert lmx.model("two")["blocked"] is None


def test_a_worker_that_drifts_is_replaced_and_no_request_fails(new_lmx: Callable[..., Lmx], tiny_model: Path) -> None:
    lmx = new_lmx(**FAULT, LMX_MEMORY__ROTATE_GRACE_S="1", LMX_FAULT='{"tokens_per_s": 50, "answer_tokens": 900}')
    lmx.start()
    lmx.load(tiny_model, "leaks")
    lmx.wait_event("memory_measured", model="leaks")
    first = lmx.model("leaks")
    stream = ask(lmx, "leaks", stream=True, max_tokens=150).wait_chunks(1)
    assert ask(lmx, "leaks", "[[ballast 150]]").wait().status == 200
    rotation = lmx.wait_event("memory_rotation", model="leaks")
    assert "more than its model" in rotation["reason"]
    later = [ask(lmx, "leaks") for _ in range(3)]
    lmx.wait_model("leaks", other_than=first["incarnation"])
    assert stream.wait().whole
    assert stream.text == "".join(f"tok{number} " for number in range(150))
    assert [call.wait().status for call in later] == [200] * 3
    lmx.wait_status(lambda doc: (doc["models"][0]["memory_bytes"] or 10**12) < 100 * MIB)
    assert lmx.model("leaks")["restarts"] == 1
    assert httpx.get(f"{lmx.url}/healthz").status_code == 200
