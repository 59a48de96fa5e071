"""What `/admin/health` makes of what is known: statuses, codes and keys."""

from typing import Any

import pytest

from gateway.admin_health import health_document, metal_check, supervisor_check
from gateway.traffic import Traffic
from gateway.vitals import (
    ExitVitals,
    MemoryVitals,
    ModelVitals,
    SupervisorVitals,
    ThermalVitals,
    Vitals,
)
from protocol.control import Capabilities, CatalogModel
from protocol.states import ModelState

OK = {"status": "ok"}


def model(name: str = "tiny", state: ModelState = ModelState.READY, **more: Any) -> CatalogModel:
    fields: dict[str, Any] = {"capabilities": Capabilities(2048, 1, ["chat"], 4), **more}
    return CatalogModel(name, state, 0, **fields)


def vitals(share: float | None = 0.5, *models: ModelVitals, **more: Any) -> Vitals:
    return Vitals(memory=MemoryVitals(machine_used_share=share), models=models, **more)


async def health(
    seen: Vitals | None = None, *models: CatalogModel, supervisor: dict[str, Any] | None = None, running: int = 0
) -> dict[str, Any]:
    traffic = Traffic()
    traffic.running = running
    known = vitals() if seen is None else seen
    return health_document(known, list(models), traffic, supervisor=supervisor or OK, uptime_s=1.23)


@pytest.mark.parametrize(
    ("share", "check", "overall"),
    [(0.84, "ok", "ok"), (0.86, "warning", "degraded"), (0.95, "warning", "degraded"), (0.96, "critical", "critical")],
)
async def test_memory_is_judged_at_85_and_95_percent(share: float, check: str, overall: str) -> None:
    found = await health(vitals(share), model())
    assert (found["checks"]["memory"]["status"], found["status"]) == (check, overall)
    assert found["memory_usage_percent"] == round(100 * share, 1)
    if overall == "critical":
        assert found["reason"] == "Memory at 96.0% - approaching OOM threshold"


async def test_unknown_memory_is_unknown_and_not_zero() -> None:
    found = await health(vitals(None), model())
    assert (found["checks"]["memory"]["status"], found["memory_usage_percent"], found["status"]) == (
        "unknown",
        None,
        "ok",
    )


async def test_every_key_of_both_forms_is_there_whatever_is_known() -> None:
    traffic = Traffic()
    for seen in (vitals(), None):
        found = health_document(seen, [], traffic, supervisor=OK, uptime_s=1.0)
        assert {
            "status", "version", "reason", "memory_usage_percent", "metal", "helpers", "models_loaded",
            "in_flight_requests", "checks", "uptime_seconds", "gpu_freq_mhz", "gpu_temp_c", "thermal_throttled",
        } <= found.keys()  # fmt: skip
        assert set(found["metal"]) == {"active_memory_gb", "peak_memory_gb", "cache_memory_gb"}
        assert {"memory", "models", "metal", "inference", "supervisor"} <= found["checks"].keys()


async def test_no_loaded_model_is_a_warning() -> None:
    found = await health(None, model(state=ModelState.STOPPED))
    assert (found["status"], found["checks"]["models"]["loaded_count"]) == ("degraded", 0)


async def test_each_worker_is_there_with_how_its_last_process_ended() -> None:
    ended = ModelVitals("bad", restarts=3, last_exit=ExitVitals("native_crash", "SIGABRT"))
    found = await health(vitals(0.5, ended), model(), model("bad", ModelState.QUARANTINED))
    check = found["checks"]["models"]
    assert (check["status"], check["model_ids"], found["status"]) == ("warning", ["tiny"], "degraded")
    worker = check["workers"]["bad"]
    assert (worker["state"], worker["last_signal"], worker["restarts"]) == ("quarantined", "SIGABRT", 3)
    assert "bad" in found["reason"]


@pytest.mark.parametrize(("running", "status"), [(0, "ok"), (3, "ok"), (4, "saturated")])
async def test_full_models_are_saturated_and_still_healthy(running: int, status: str) -> None:
    found = await health(None, model(), running=running)
    check = found["checks"]["inference"]
    assert (check["status"], check["in_flight"], check["max_concurrent"]) == (status, running, 4)
    assert check["capacity_pct"] == 25 * running
    assert found["status"] == "ok"


async def test_a_limit_that_memory_has_lowered_is_the_one_that_counts() -> None:
    found = await health(vitals(0.5, ModelVitals("tiny", concurrent_limit=2)), model(), running=2)
    assert found["checks"]["inference"]["max_concurrent"] == 2
    assert found["checks"]["inference"]["status"] == "saturated"


def test_metal_is_the_workers_sum_and_a_missing_gpu_is_critical_only_where_there_should_be_one() -> None:
    two = vitals(
        0.5,
        ModelVitals("a", pid=1, active_bytes=1_000_000_000, peak_bytes=3_000_000_000, cache_bytes=0),
        ModelVitals("b", pid=2, active_bytes=500_000_000, last_exit=ExitVitals("no_device")),
    )
    linux = metal_check([model()], two, "linux")
    assert (linux["status"], linux["active_memory_gb"], linux["peak_memory_gb"]) == ("unavailable", 1.5, 3.0)
    assert metal_check([model()], two, "darwin")["status"] == "critical"
    assert metal_check([model()], vitals(), "darwin")["status"] == "ok"
    assert metal_check([], None, "darwin") == {
        "status": "unknown", "active_memory_gb": None, "peak_memory_gb": None, "cache_memory_gb": None,
    }  # fmt: skip


async def test_helpers_are_models_that_embed_and_rank() -> None:
    able = Capabilities(512, 1, ["embedding", "rerank"], 4)
    none = await health(None, model())
    assert none["helpers"]["embedding"] == {"url": None, "healthy": None}
    up = await health(None, model(), model("e", capabilities=able))
    assert (up["helpers"]["reranking"]["healthy"], up["status"]) == (True, "ok")
    down = await health(None, model(), model("e", ModelState.BACKOFF, capabilities=able))
    assert (down["helpers"]["embedding"]["healthy"], down["status"]) == (False, "degraded")
    assert "One or more helper nodes unhealthy" in down["reason"]


async def test_heat_and_the_supervisor_can_degrade_and_say_why() -> None:
    hot = await health(vitals(0.5, thermal=ThermalVitals("throttled", 800.0, 101.0)), model())
    assert (hot["status"], hot["thermal_throttled"], hot["gpu_freq_mhz"]) == ("degraded", True, 800.0)
    check = supervisor_check(Vitals(supervisor=SupervisorVitals(safe_mode="3 starts", state_durable=False)))
    found = await health(None, model(), supervisor=check)
    assert found["status"] == "degraded"
    assert "Safe mode: 3 starts" in found["reason"]
