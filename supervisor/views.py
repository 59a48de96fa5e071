"""What others see of the slots: the gateway's catalog and the status document. Pure functions."""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from protocol import __version__, control
from protocol.states import ModelState
from supervisor.exits import ExitRecord
from supervisor.host import GATEWAY
from supervisor.managed import Managed

STATUS_SCHEMA: Final = "lmx.status/1"
_MAX_LISTED: Final = 1000


#: Why nobody should wait for a model that has no process while all are being ended: the error's code, and words.
ENDING: Final = ("shutting_down", "the server is stopping")


def catalog_model(managed: Managed, now: float, *, ending: bool = False) -> control.CatalogModel:
    """Return one model as the gateway should see it at monotonic time `now`. `ending`: nothing is started any more."""
    slot = managed.slot
    code, reason, retry = (*ENDING, None) if ending and not slot.alive else _why_not(managed, now)
    return control.CatalogModel(
        id=managed.model,
        state=slot.state,
        created_at=int(managed.created_at),
        incarnation=slot.incarnation,
        endpoint=managed.endpoint if slot.state in {ModelState.READY, ModelState.DRAINING} and not code else "",
        capabilities=managed.capabilities,
        error_code=code,
        reason=reason,
        retry_after_s=retry,
        done_bytes=slot.done_bytes,
        total_bytes=slot.total_bytes,
    )


def loadable_model(
    model: str, folder: Path, *, on_demand: bool = False, refusal: tuple[str, str] | None = None
) -> control.CatalogModel:
    """Return a model that lies in the models folder and is not loaded.

    `on_demand`: a request loads it. `refusal` is the error's code and words if that was refused a moment ago.
    """
    code, reason = "model_not_found", f"it is not loaded: lmx-supervisor load {model}"
    if on_demand:
        code, reason = refusal or ("model_loading", "it is loaded for the first request")
    try:
        created = int(folder.stat().st_mtime)
    except OSError:
        created = 0
    return control.CatalogModel(
        id=model,
        state=ModelState.STOPPED,
        created_at=created,
        error_code=code,
        reason=reason,
        on_demand=on_demand and refusal is None,
    )


def loadable_folders(models: Path) -> dict[str, Path]:
    """Return the folders under `models` that look like models, by id; at most 1,000."""
    try:
        found = [entry for entry in sorted(models.iterdir())[:_MAX_LISTED] if (entry / "config.json").is_file()]
    except OSError:
        return {}
    return {entry.name.replace("--", "/", 1): entry for entry in found}


def _why_not(managed: Managed, now: float) -> tuple[str, str, int | None]:
    """Return (error code, words, seconds to wait) for a model that takes no requests; all empty for a ready one."""
    slot = managed.slot
    ended_for_memory = slot.last_exit is not None and slot.last_exit.name == "memory_pressure"
    if managed.account.short or (slot.state is ModelState.BACKOFF and ended_for_memory):
        words = "the machine is short of memory" if ended_for_memory else "there is no room for it now"
        return "insufficient_memory", f"{words}; it starts when there is room", 30
    if managed.account.leaving:
        return "model_not_found", f"it was unloaded: {managed.account.leaving}", None
    if managed.foreign:
        return "model_restarting", "its process is of another version and is being replaced", 5
    match slot.state:
        case ModelState.READY:
            return "", "", None
        case ModelState.QUARANTINED:
            return "model_quarantined", f"it was set aside: {_public(slot.last_exit, slot.reason)}", 120
        case ModelState.BACKOFF:
            wait = max(1, round(slot.retry_at - now) + max(1, round(slot.load_s)))
            return "model_restarting", f"its process ended ({_public(slot.last_exit, slot.reason)})", wait
        case ModelState.STARTING | ModelState.LOADING | ModelState.WARMING:
            first = slot.last_exit is None
            code = "model_loading" if first else "model_restarting"
            return code, "it is being loaded", max(2, round(slot.load_s))
        case _ if slot.wanted:
            return "model_restarting", "its process is being replaced", max(2, round(slot.load_s))
    return "model_not_found", "it is being unloaded", None


def _public(record: ExitRecord | None, otherwise: str) -> str:
    """Return the class of the last end: its detailed words are for operators, not for clients."""
    return otherwise if record is None else record.name.replace("_", " ")


def status_document(
    slots: Iterable[Managed],
    *,
    url: str,
    started_at: float,
    problem: str,
    safe_mode: str,
    handed_over: bool,
    breaker_open_s: float,
    internal_errors: int,
    now: float,
) -> dict[str, Any]:
    """Return the document of `lmx-supervisor status --json`. `now` is monotonic, `started_at` Unix time."""
    slots = list(slots)
    gateway = next((managed for managed in slots if managed.name == GATEWAY), None)
    return {
        "schema": STATUS_SCHEMA,
        "supervisor": {
            "pid": os.getpid(),
            "uptime_s": round(time.time() - started_at, 3),
            "version": __version__,
            "state_durable": not problem,
            "state_problem": problem or None,
            "safe_mode": safe_mode or None,
            "handed_over": handed_over,
            "host_breaker_open_s": round(breaker_open_s, 1) or None,
            "internal_errors": internal_errors,
        },
        "gateway": {
            "pid": gateway.slot.pid or None,
            "url": url,
            "state": gateway.slot.state.value,
            "incarnation": gateway.slot.incarnation,
            "restarts": gateway.slot.restarts,
            "last_exit": _exit(gateway.slot.last_exit),
            "memory_bytes": gateway.memory_bytes,
        }
        if gateway is not None
        else None,
        "models": [_model(managed, now) for managed in slots if managed.model],
    }


def _model(managed: Managed, now: float) -> dict[str, Any]:
    slot = managed.slot
    beat = managed.heartbeat if slot.pid else None
    return {
        "id": managed.model,
        "state": slot.state.value,
        "pid": slot.pid or None,
        "incarnation": slot.incarnation,
        "restarts": slot.restarts,
        "last_exit": _exit(slot.last_exit),
        "memory_bytes": managed.memory_bytes,
        "path": managed.path,
        "reason": slot.reason or None,
        "blocked": managed.blocked or None,
        "state_for_s": round(now - slot.since, 3),
        "degraded": slot.degraded and slot.pid != 0,
        "probe_in_s": round(max(0.0, slot.probe_at - now), 1) if slot.probe_at else None,
        "retry_in_s": round(max(0.0, slot.retry_at - now), 3) if slot.state is ModelState.BACKOFF else None,
        "load_s": round(slot.load_s, 3) or None,
        "progress": {"done_bytes": slot.done_bytes, "total_bytes": slot.total_bytes},
        "phase": beat.phase.value if beat else None,
        "running": beat.running if beat else None,
        "waiting": beat.waiting if beat else None,
        "concurrent_limit": (beat.concurrent_limit or None) if beat else None,
        "kv_reserved_bytes": beat.kv_reserved_bytes if beat else None,
        "kv_limit_bytes": (beat.kv_limit_bytes or None) if beat else None,
        "active_bytes": beat.active_bytes if beat else None,
        "heartbeat_late": slot.late,
        "cache_bytes": beat.cache_bytes if beat else None,
        "peak_bytes": beat.peak_bytes if beat else None,
    }


def _exit(record: ExitRecord | None) -> dict[str, Any] | None:
    if record is None:
        return None
    return {
        "class": record.name,
        "reason": record.reason,
        "at": record.at,
        "code": record.code,
        "signal": record.signal,
        "hint": record.hint or None,
    }
