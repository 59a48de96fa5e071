"""What operators read: the status table, sizes and times in words. Pure functions from the status document."""

import time
from typing import Any, Final

_KIB: Final = 1024.0
_MINUTE: Final = 60
_HOUR: Final = 3600
_DAY: Final = 86400
_HEADINGS: Final = ("MODEL", "STATE", "PID", "INC", "RESTARTS", "MEM", "PREDICTED", "RUN", "WAIT", "LAST EXIT")
_MAX_REASON: Final = 160


def size(count: int | None) -> str:
    """Return bytes in words, "?" when unknown."""
    if count is None:
        return "?"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < _KIB:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= _KIB
    return f"{value:.1f} TiB"


def duration(seconds: float) -> str:
    """Return a duration in words, at most two units."""
    whole = max(0, int(seconds))  # a clock that was set back
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    if whole < _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"
    return f"{whole // _DAY} d {whole % _DAY // _HOUR} h"


def status_text(document: dict[str, Any]) -> str:
    """Return the status document as lines for a person."""
    supervisor, gateway = document["supervisor"], document["gateway"]
    lines = [f"supervisor  pid {supervisor['pid']}, up {duration(supervisor['uptime_s'])}"]
    if not supervisor.get("state_durable", True):
        lines.append(f"STATE NOT DURABLE: {supervisor.get('state_problem')}")
    if supervisor.get("safe_mode"):
        lines.append(f"SAFE MODE: {supervisor['safe_mode']}; nothing is loaded by itself until: lmx-supervisor resume")
    if supervisor.get("host_breaker_open_s"):
        seconds = supervisor["host_breaker_open_s"]
        lines.append(f"HOST BREAKER open {seconds:.0f} s: several models failed together; starts are rationed")
    if supervisor.get("internal_errors"):
        lines.append(f"INTERNAL ERRORS: {supervisor['internal_errors']}; see logs/supervisor.log, and report them")
    if gateway is not None:
        pid = f"pid {gateway['pid']}, " if gateway["pid"] else ""
        lines.append(f"gateway     {pid}{gateway['state']}, {gateway['url'] or 'not listening'}{_restarts(gateway)}")
    if document.get("memory"):
        lines.append(_memory(document["memory"]))
    lines += [f"LAUNCHD: {_one_line(problem)}" for problem in document.get("job_problems", ())]
    if (document.get("thermal") or {}).get("status") == "throttled":
        thermal = document["thermal"]
        lines.append(f"THROTTLED: the GPU runs at {thermal['gpu_freq_mhz']:.0f} MHz though it has work; it is too hot")
    lines.append("")
    if not document["models"]:
        lines.append("no models; load one with: lmx-supervisor load smollm2-135m-instruct")
        return "\n".join(lines)
    rows = [_HEADINGS, *(_row(model) for model in document["models"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [_note(model) for model in document["models"]]
    lines += [note for note in notes if note]
    return "\n".join(lines)


def _memory(memory: dict[str, Any]) -> str:
    """Return the host line: what our processes use of what they may, and how the machine is."""
    words = [
        f"memory      {size(memory['used_bytes'])} of {size(memory['limit_bytes'])} used",
        f"{size(memory['reserve_bytes'])} reserved of {size(memory['total_bytes'])}",
        f"{size(memory['available_bytes'])} available",
    ]
    if memory["pressure"] not in {None, "normal"}:
        words.append(f"PRESSURE {memory['pressure'].upper()}")
    if memory["shedding"]:
        words.append("SHEDDING: requests are refused until there is more")
    if not memory["monitored"]:
        words.append("UNMONITORED: no model is loaded while memory cannot be measured")
    return ", ".join(words)


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    return (
        model["id"],
        _state(model),
        str(model["pid"] or "-"),
        f"#{model['incarnation']}" if model["incarnation"] else "-",
        str(model["restarts"]),
        size(model["memory_bytes"]) if model["pid"] else "-",
        size(model.get("predicted_bytes")) if model.get("predicted_bytes") else "-",
        _count(model["running"]),
        _count(model["waiting"]),
        _last_exit(model["last_exit"]),
    )


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _state(model: dict[str, Any]) -> str:
    state: str = model["state"]
    progress = model["progress"]
    if state == "loading" and progress["total_bytes"]:
        return f"loading {min(100, 100 * progress['done_bytes'] // progress['total_bytes'])} %"
    if state == "backoff" and model["retry_in_s"] is not None:
        return f"backoff {model['retry_in_s']:.0f} s"
    if model.get("degraded"):
        return f"{state} (degraded)"
    if model.get("closed"):
        return f"{state} (memory high)"
    if model.get("monitored") is False and model["pid"]:
        return f"{state} (UNMONITORED)"
    return f"{state} (late)" if model["heartbeat_late"] else state


def _last_exit(record: dict[str, Any] | None) -> str:
    if record is None:
        return "-"
    how = record["signal"] or ("" if record["code"] is None else f"exit {record['code']}")
    ago = duration(max(0.0, time.time() - record["at"]))
    return f"{record['class']}{f' {how}' if how else ''}, {ago} ago"


def _restarts(gateway: dict[str, Any]) -> str:
    return f", restarts {gateway['restarts']}, last {_last_exit(gateway['last_exit'])}" if gateway["restarts"] else ""


def _note(model: dict[str, Any]) -> str:
    if model.get("blocked"):
        return f"{model['id']}: {_one_line(model['blocked'])}"
    if model["state"] != "quarantined":
        return _slowness(model)
    reason = _one_line(model["reason"] or "")[:_MAX_REASON]
    hint = (model["last_exit"] or {}).get("hint")
    reason += f"\n  {hint}" if hint else ""
    probe = f"; tried again by itself in {duration(model['probe_in_s'])}" if model.get("probe_in_s") else ""
    return f"{model['id']} was set aside: {reason}{probe}\n  try again with: lmx-supervisor reset {model['id']}"


def _slowness(model: dict[str, Any]) -> str:
    if not model.get("slow") or model["state"] != "ready":
        return ""
    pace = f"{model['pace']:.2f} of its usual speed"
    return f"{model['id']} generates at {pace}: is the GPU held back? lmx-supervisor doctor"


def _one_line(text: str) -> str:
    """Return text that a process gave us without what would move the cursor or colour the terminal."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))
