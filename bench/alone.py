"""The gateway alone, before a worker without a model: events, connections, start, memory. `python -m bench.alone`.

What a model needs is not in these figures. Events are counted by the client, and what they cost by the CPU seconds of
the gateway: on two cores the client and the worker cost more than the gateway does.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec

from bench.compare import head
from bench.host import Host
from bench.measures import Meter, resident_bytes, spread
from bench.null import STEPS_VARIABLE, make_folder
from bench.options import at_least_one, end_cleanly
from bench.workloads import Workload

_MODEL: Final = "null"
_MIB: Final = 1024**2
#: More steps a second than a worker makes: it gives what it can.
_UNPACED: Final = "1000000"
#: Less than the gateway can write here: what it is late with it writes in fewer events.
_PACED: Final = "600"
_STREAMS: Final = 64
#: Everything may wait here: what is measured is whether a connection is lost, not the limits.
_QUEUE: Final = 4096
_CONNECTIONS: Final = (64, 256, 1000)


class Alone:
    """An LMX whose worker has no model. `steps_per_s` bounds how fast the worker is."""

    def __init__(self, work: Path, steps_per_s: str = _UNPACED, **settings: str) -> None:
        self.host = Host(
            LMX_WORKER__MODULE="bench.null",
            LMX_MODELS__MAX_CONCURRENT_REQUESTS=str(_STREAMS),
            LMX_MODELS__QUEUE_DEPTH=str(_QUEUE),
            LMX_MODELS__SLOT_TIMEOUT_S="300",
            LMX_MEMORY__KV_TOKENS="0",
            **{STEPS_VARIABLE: steps_per_s},
            **settings,
        )
        try:
            self.host.start().load(make_folder(work / "null"), _MODEL)
            self.url = self.host.url
        except BaseException:
            self.host.close()
            raise

    def ask(self, workload: Workload) -> dict[str, Any]:
        """Run a workload with a client of its own; return its summary, and what every process used."""
        meter = Meter(self.host.pids())
        given = msgspec.json.encode(workload).decode()
        command = [sys.executable, "-P", "-m", "bench.load", self.url, _MODEL, given]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        measured: dict[str, Any] = msgspec.json.decode(done.stdout)
        return {**measured, **meter.stop(measured["client_cpu_s"])}


Note = Callable[[str, float], None]


def measure(work: Path, rounds: int, say: Callable[[str], None], *, storm: bool = False) -> dict[str, Any]:
    """Return every figure, a list of one per round each; times in ms, memory in MiB. `storm`: connections only."""
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    connections: dict[str, dict[str, int]] = {}
    alone = Alone(work)
    try:
        started = {part: resident_bytes(pid) for part, pid in alone.host.pids().items()}
        for part, size in started.items():
            note(f"memory of the {part if part != 'worker' else 'null worker'} at start, MiB", size / _MIB)
        alone.ask(Workload("warm-up", _STREAMS, 64, 2))
        for number in range(rounds):
            if not storm:
                say(f"round {number + 1} of {rounds}: {_STREAMS} streams")
                _measure_streams(alone, note)
            say(f"round {number + 1} of {rounds}: connections")
            _measure_connections(alone, note, connections)
            if not storm:
                say(f"round {number + 1} of {rounds}: starts")
                note("`lmx-supervisor status`, ms", _status_ms(alone.host))
                note("gateway: process started to serving, ms", _gateway_start_ms(alone.host))
        for part, pid in alone.host.pids().items():
            if part != "worker":
                note(f"memory of the {part} after {rounds} rounds, MiB", resident_bytes(pid) / _MIB)
    finally:
        alone.host.close()
    if not storm:
        _measure_events(work, rounds, note, say)
    return {**head(), "figures": found, "connections": connections}


def _measure_events(work: Path, rounds: int, note: Note, say: Callable[[str], None]) -> None:
    """Let each token be an event: a worker that sends each step by itself, no faster than its gateway can write."""
    alone = Alone(work, _PACED, LMX_MODELS__GATHER_S="0")
    try:
        alone.ask(Workload("warm-up", _STREAMS, 64, 2))
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}: {_STREAMS} streams, an event for each token")
            measured = alone.ask(Workload("events", _STREAMS, 2000))
            note("events a second, an event for each token", measured["events"] / measured["seconds"])
            note("events per CPU second of the gateway", measured["events"] / measured["cpu_s"]["gateway"])
    finally:
        alone.host.close()


def _measure_streams(alone: Alone, note: Note) -> None:
    measured = alone.ask(Workload("streams", _STREAMS, 1000))
    gateway_s = measured["cpu_s"]["gateway"]
    note("tokens per CPU second of the gateway, merged into fewer events", measured["tokens"] / gateway_s)
    for part in ("gateway", "worker", "supervisor"):
        note(f"CPU ms per 1,000 tokens: {part}", measured["cpu_s"][part] / measured["tokens"] * 1e6)


def _measure_connections(alone: Alone, note: Note, connections: dict[str, dict[str, int]]) -> None:
    for count in _CONNECTIONS:
        measured = alone.ask(Workload(f"{count} connections", count, 8))
        so_far = connections.setdefault(str(count), {"answered": 0})
        so_far["answered"] += measured["requests"]
        for what, failed in measured["errors"].items():
            so_far[what] = so_far.get(what, 0) + failed
        if measured["ttft_s"]:
            note(f"{count} connections at once: time to first text p50, ms", median(measured["ttft_s"]) * 1000)


def _status_ms(host: Host) -> float:
    began = time.perf_counter()
    host.command("status", "--json")
    return (time.perf_counter() - began) * 1000


def _gateway_start_ms(host: Host) -> float:
    """Kill the gateway; return how long the next one took from its start to serving, by the supervisor's journal."""
    document = host.status()
    pid, url = document["gateway"]["pid"], document["gateway"]["url"]
    os.kill(pid, signal.SIGKILL)
    with urllib.request.urlopen(f"{url}/healthz", timeout=60) as response:
        response.read()
    host.wait(lambda doc: doc["gateway"]["state"] == "ready" and doc["gateway"]["pid"] not in {None, pid})
    host.wait(lambda doc: all(model["state"] == "ready" for model in doc["models"]))
    journal = host.journal()
    ready = [each for each in journal if each["event"] == "gateway_state_changed" and each["state"] == "ready"][-1]
    started = [each for each in journal if each["event"] == "process_started" and each["pid"] == ready["pid"]][-1]
    return float(ready["ts"] - started["ts"]) * 1000


def markdown(report: dict[str, Any]) -> str:
    """Return the table."""
    lines = [f"LMX {report['version']}, {report['machine']}, a worker without a model.", ""]
    lines += ["| | median | lowest to highest |", "|---|---|---|"]
    for name, values in report["figures"].items():
        found = spread(values)
        if found is not None:
            lines.append(f"| {name} | {found.median:,.0f} | {found.low:,.0f} to {found.high:,.0f} |")
    for count, ends in report["connections"].items():
        words = ", ".join(f"{number} {what}" for what, number in ends.items())
        lines.append(f"| {count} connections at once: requests | {words} | |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.alone", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=at_least_one, default=5)
    parser.add_argument("--storm", action="store_true", help="connections only; exits with 1 if one is lost")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    args = parser.parse_args()
    end_cleanly()
    with tempfile.TemporaryDirectory(prefix="lmx-bench-", dir="/tmp") as work:
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        report = measure(Path(work), args.rounds, say, storm=args.storm)
    print(markdown(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    lost = any(set(ends) != {"answered"} for ends in report["connections"].values())
    return 1 if args.storm and lost else 0


if __name__ == "__main__":
    sys.exit(main())
