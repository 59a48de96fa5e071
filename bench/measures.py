"""What processes cost, read from the system; and the statistics of a few rounds."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil


class Spread(NamedTuple):
    """The middle of some values, and how far they lie apart."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread | None:
    """Return the spread of these; None where there are none."""
    return Spread(median(values), min(values), max(values)) if values else None


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that a `share` of these do not exceed (nearest rank); nan of none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[max(0, ceil(share * len(ordered)) - 1)]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the growth of y per 1,000 of x, in percent of the mean of y (least squares); 0 where x is one.

    Raises `ZeroDivisionError` without points.
    """
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if not spread or not mean_y:
        return 0.0
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread * 1000 / mean_y * 100


def cpu_s(pid: int) -> float:
    """Return the CPU seconds, user and system, of a process without its children; 0 if it is gone."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def machine_cpu_s() -> float:
    """Return the CPU seconds that the machine has spent on anything."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))


def resident_bytes(pid: int) -> int:
    """Return what a process has in memory now, 0 if it is gone. Libraries that it shares count in full."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def peak_bytes(pid: int) -> int:
    """Return the most a process ever had in memory; what it has now where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resident_bytes(pid)


class Meter:
    """What some processes, and everyone else, used between its making and `stop`."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
        self._began = time.monotonic()
        self._machine = machine_cpu_s()
        self._used = {name: cpu_s(pid) for name, pid in self._pids.items()}

    def stop(self, client_cpu_s: float = 0.0) -> dict[str, object]:
        """Return `cpu_s` and `peak_bytes` by name, and `others`: the share of the machine that anyone else took."""
        used = {name: cpu_s(pid) - self._used[name] for name, pid in self._pids.items()}
        used["client"] = client_cpu_s
        wall = max(time.monotonic() - self._began, 1e-9)
        others = machine_cpu_s() - self._machine - sum(used.values())
        return {
            "cpu_s": used,
            "peak_bytes": {name: peak_bytes(pid) for name, pid in self._pids.items()},
            "others": max(0.0, others / wall / (psutil.cpu_count() or 1)),
        }
