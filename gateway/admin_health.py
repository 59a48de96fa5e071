"""`/admin/health`: every subsystem, how it is, and how long it took to find out. Never throttled, never shed."""

import sys
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
from starlette.types import Receive, Scope, Send

from gateway.admin_call import hello_of, parameters, send_document
from gateway.audit import Audit
from gateway.catalog import CatalogView
from gateway.exposition import AuditCounts
from gateway.forward import Forwarder
from gateway.traffic import Traffic
from gateway.vitals import ModelVitals, Vitals, VitalsView
from protocol import __version__
from protocol.control import CatalogModel, StatusRequest
from protocol.errors import LmxError
from protocol.states import ModelState

WARNING_PERCENT: Final = 85.0
CRITICAL_PERCENT: Final = 95.0
SATURATED_PERCENT: Final = 90.0
#: A supervisor that needs longer to answer is as good as away, and a probe should not wait for it.
_SUPERVISOR_S: Final = 2.0
_GB: Final = 1e9
#: It should serve and cannot for now.
_TROUBLE: Final = frozenset({ModelState.BACKOFF, ModelState.QUARANTINED})
#: How bad a check is for the whole; any other status is fine.
_RANK: Final = {"warning": 1, "critical": 2}
_OVERALL: Final = ("ok", "degraded", "critical")
_STATUS: Final = {"ok": 200, "degraded": 200, "critical": 503}

Check = dict[str, Any]


class AdminHealth:
    """Looks at everything, and answers 503 only for what is critical."""

    def __init__(
        self, forwarder: Forwarder, catalog: CatalogView, vitals: VitalsView, traffic: Traffic, audit: Audit
    ) -> None:
        self._forwarder = forwarder
        self._audit = audit
        self._catalog = catalog
        self._vitals = vitals
        self._traffic = traffic
        self._started_at = time.monotonic()

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer."""
        parameters(scope)
        began = time.perf_counter()
        supervisor, asked = await self._supervisor(scope)
        supervisor["latency_ms"] = _ms_since(began)
        # What it said in this moment; while it is away, what it said last.
        vitals = asked or self._vitals.fresh
        uptime_s = time.monotonic() - self._started_at
        document = health_document(
            vitals,
            self._catalog.models(),
            self._traffic,
            supervisor=supervisor,
            uptime_s=uptime_s,
            audit=self._audit.counts(),
        )
        await send_document(send, msgspec.json.encode(document), _STATUS[document["status"]])

    async def _supervisor(self, scope: Scope) -> tuple[Check, Vitals | None]:
        try:
            answer = await self._forwarder.ask(StatusRequest(), hello_of(scope), within_s=_SUPERVISOR_S)
            vitals = msgspec.json.decode(answer, type=Vitals)
        except LmxError as error:
            return {"status": "warning", "reason": error.message}, None
        except msgspec.MsgspecError:
            return {"status": "warning", "reason": "The supervisor speaks of its status in another way."}, None
        return supervisor_check(vitals), vitals


def health_document(
    vitals: Vitals | None,
    models: list[CatalogModel],
    traffic: Traffic,
    *,
    supervisor: Check,
    uptime_s: float,
    audit: AuditCounts = AuditCounts(),  # noqa: B008 - it cannot be changed
) -> dict[str, Any]:
    """Return the body: flat keys for people and older monitors, and `checks`. Pure but for the clock of latencies."""
    checks: dict[str, Check] = {
        "memory": _timed(lambda: memory_check(vitals)),
        "models": _timed(lambda: models_check(models, vitals)),
        "metal": _timed(lambda: metal_check(models, vitals)),
        "inference": _timed(lambda: inference_check(models, vitals, traffic)),
        "gateway": _timed(lambda: gateway_check(traffic)),
        "helpers": _timed(lambda: helpers_check(models)),
        "thermal": _timed(lambda: thermal_check(vitals)),
        "audit": _timed(lambda: audit_check(audit)),
        "supervisor": supervisor,
    }
    worst = max((_RANK.get(check["status"], 0) for check in checks.values()), default=0)
    reasons = [check["reason"] for check in checks.values() if check.get("reason") and check["status"] in _RANK]
    helpers = {"embedding": _helper(models, "embedding"), "reranking": _helper(models, "rerank")}
    thermal = checks["thermal"]
    return {
        "status": _OVERALL[worst],
        "version": __version__,
        "reason": "; ".join(reasons) or None,
        "memory_usage_percent": checks["memory"].get("usage_pct"),
        "metal": {name: checks["metal"][name] for name in ("active_memory_gb", "peak_memory_gb", "cache_memory_gb")},
        "helpers": helpers,
        "models_loaded": checks["models"]["loaded_count"],
        "in_flight_requests": traffic.running,
        "uptime_seconds": round(uptime_s, 1),
        "thermal_status": thermal["thermal_status"],
        "thermal_throttled": thermal["thermal_status"] == "throttled" if thermal["status"] != "unknown" else None,
        "gpu_freq_mhz": thermal["gpu_freq_mhz"],
        "gpu_temp_c": thermal["gpu_temp_c"],
        "checks": checks,
    }


def memory_check(vitals: Vitals | None) -> Check:
    """Judge the machine's memory."""
    percent = None if vitals is None else vitals.memory_percent
    if vitals is None or percent is None:
        return {"status": "unknown", "usage_pct": None}
    check: Check = {
        "status": "ok",
        "usage_pct": percent,
        "total_bytes": vitals.memory.total_bytes,
        "used_by_lmx_bytes": vitals.memory.used_bytes,
        "limit_bytes": vitals.memory.limit_bytes,
        "pressure": vitals.memory.pressure,
        "shedding": vitals.memory.shedding,
    }
    if percent > CRITICAL_PERCENT:
        check |= {"status": "critical", "reason": f"Memory at {percent}% - approaching OOM threshold"}
    elif percent > WARNING_PERCENT:
        check |= {"status": "warning", "reason": f"Memory at {percent}%"}
    return check


def models_check(models: list[CatalogModel], vitals: Vitals | None) -> Check:
    """Judge the models: each that should serve and does not is named, with how its last process ended."""
    ready = [model.id for model in models if model.state is ModelState.READY]
    seen = {each.id: each for each in vitals.models} if vitals is not None else {}
    workers = {
        model.id: _worker(model, seen.get(model.id))
        for model in models
        if model.state is not ModelState.STOPPED or model.id in seen
    }
    trouble = [model.id for model in models if model.state in _TROUBLE]
    late = [each.id for each in seen.values() if each.heartbeat_late]
    check: Check = {"status": "ok", "loaded_count": len(ready), "model_ids": ready, "workers": workers}
    if not ready:
        check |= {"status": "warning", "reason": "No model is loaded"}
    elif trouble or late:
        check |= {"status": "warning", "reason": f"Not well: {', '.join(dict.fromkeys([*trouble, *late]))}"}
    return check


def _worker(model: CatalogModel, seen: ModelVitals | None) -> dict[str, Any]:
    end = None if seen is None else seen.last_exit
    return {
        "state": model.state.value,
        "restarts": None if seen is None else seen.restarts,
        "last_exit": None if end is None else end.kind,
        "last_signal": None if end is None else end.signal,
        "memory_bytes": None if seen is None else seen.memory_bytes,
        "heartbeat_late": None if seen is None else seen.heartbeat_late,
        "degraded": None if seen is None else seen.degraded,
        "reason": (model.reason or None) if seen is None else seen.reason,
    }


def metal_check(models: list[CatalogModel], vitals: Vitals | None, platform: str = sys.platform) -> Check:
    """Judge the GPU by the workers, which alone use it; the figures are the sums of theirs."""
    seen = () if vitals is None else vitals.models
    figures = {
        "active_memory_gb": _sum_gb([each.active_bytes for each in seen if each.pid]),
        "peak_memory_gb": _sum_gb([each.peak_bytes for each in seen if each.pid]),
        "cache_memory_gb": _sum_gb([each.cache_bytes for each in seen if each.pid]),
    }
    if platform != "darwin":
        return {"status": "unavailable", **figures}
    if any(each.last_exit is not None and each.last_exit.kind == "no_device" for each in seen):
        return {"status": "critical", "reason": "A worker found no GPU it can use", **figures}
    serving = any(model.state is ModelState.READY for model in models)
    return {"status": "ok" if serving else "unknown", **figures}


def inference_check(models: list[CatalogModel], vitals: Vitals | None, traffic: Traffic) -> Check:
    """Say how full the models are that serve."""
    limits = {each.id: each.concurrent_limit for each in vitals.models} if vitals is not None else {}
    most = sum(
        limits.get(model.id) or (model.capabilities.max_concurrent_requests if model.capabilities else 0)
        for model in models
        if model.state is ModelState.READY
    )
    percent = round(100 * traffic.running / most, 1) if most else None
    saturated = percent is not None and percent >= SATURATED_PERCENT
    return {
        "status": "saturated" if saturated else "ok",
        "in_flight": traffic.running,
        "max_concurrent": most,
        "capacity_pct": percent,
    }


def audit_check(counts: AuditCounts) -> Check:
    """Say whether requests are noted; that they are not keeps none from being answered."""
    figures = {"written": counts.written, "dropped": counts.dropped, "waiting": counts.waiting}
    if counts.problem:
        return {"status": "warning", "reason": f"The audit cannot be written: {counts.problem}", **figures}
    return {"status": "ok", **figures}


def gateway_check(traffic: Traffic) -> Check:
    """Say whether this gateway takes requests."""
    if traffic.draining:
        return {"status": "warning", "reason": "The gateway is draining", "draining": True}
    return {"status": "ok", "draining": False}


def thermal_check(vitals: Vitals | None) -> Check:
    """Say whether the GPU is held back for its heat."""
    thermal = None if vitals is None else vitals.thermal
    status = "unknown" if thermal is None else thermal.status
    check: Check = {
        "status": "unknown" if status == "unknown" else "ok",
        "thermal_status": status,
        "gpu_freq_mhz": None if thermal is None else thermal.gpu_freq_mhz,
        "gpu_temp_c": None if thermal is None else thermal.gpu_temp_c,
    }
    if status == "throttled":
        check |= {"status": "warning", "reason": "The GPU is held back for its heat"}
    return check


def supervisor_check(vitals: Vitals) -> Check:
    """Judge what the supervisor says of itself."""
    seen = vitals.supervisor
    check: Check = {
        "status": "ok",
        "uptime_s": seen.uptime_s,
        "version": seen.version,
        "state_durable": seen.state_durable,
        "safe_mode": seen.safe_mode,
        "host_breaker_open_s": seen.host_breaker_open_s,
        "internal_errors": seen.internal_errors,
    }
    reasons = [
        *([f"Safe mode: {seen.safe_mode}"] if seen.safe_mode else []),
        *([] if seen.state_durable else [f"State is not durable: {seen.state_problem}"]),
        *(["Several models failed together; starts are held back"] if seen.host_breaker_open_s else []),
    ]
    return check | {"status": "warning", "reason": "; ".join(reasons)} if reasons else check


def helpers_check(models: list[CatalogModel]) -> Check:
    """Judge the models that embed and rank, where there are any."""
    helpers = [_helper(models, kind)["healthy"] for kind in ("embedding", "rerank")]
    if False in helpers:
        return {"status": "warning", "reason": "One or more helper nodes unhealthy"}
    return {"status": "ok" if True in helpers else "none"}


def _helper(models: list[CatalogModel], kind: str) -> dict[str, Any]:
    """Return how a kind of helper is that other systems keep on nodes of their own and LMX has as a model."""
    able = [model for model in models if model.capabilities is not None and kind in model.capabilities.kinds]
    return {"url": None, "healthy": any(model.state is ModelState.READY for model in able) if able else None}


def _sum_gb(sizes: list[int | None]) -> float | None:
    known = [size for size in sizes if size is not None]
    return round(sum(known) / _GB, 2) if known else None


def _timed(look: Callable[[], Check]) -> Check:
    began = time.perf_counter()
    check = look()
    return {**check, "latency_ms": _ms_since(began)}


def _ms_since(began: float) -> float:
    return round((time.perf_counter() - began) * 1000, 3)
