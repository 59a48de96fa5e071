"""How fast a death is seen and made good, from the supervisor's own journal.

`python -m bench.recovery` kills a model and the gateway, and then compares a model's recovery with the warm spare and
without: two supervisors in one session on the same model folder, killed in turns, so that a noisy machine disturbs
both. The tables go to stdout, progress to stderr. From a checkout only.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Final

from bench.options import at_least_one, end_cleanly
from tests.harness import Lmx
from tests.modelkit import make_tiny_model

MODEL: Final = "bench"
#: What is allowed on top of the plain load time of the model in a warm process.
ALLOWED_S: Final = 0.5

#: Every restart is at once, as if the process had served for long: the delay is a setting, not a cost.
AT_ONCE = {
    "LMX_LIFECYCLE__STABLE_S": "0.001",
    "LMX_LIFECYCLE__FORGIVE_ONE_S": "0.001",
    "LMX_LIFECYCLE__FORGIVE_ALL_S": "0.001",
}
#: Between two kills; a process that has just become ready still has work to do.
_REST_S = 0.5


def measure_recovery(lmx: Lmx, model: str, repetitions: int, say: Callable[[str], None]) -> dict[str, list[float]]:
    """Return milliseconds by name of what was measured, one per repetition."""
    found: dict[str, list[float]] = {}
    for number in range(repetitions):
        say(f"recovery {number + 1}/{repetitions}")
        measured = [*_kill_worker(lmx, model), *_kill_gateway(lmx), *_ask_status(lmx)]
        for name, seconds in measured:
            found.setdefault(name, []).append(seconds * 1000)
    return found


def _kill_worker(lmx: Lmx, model: str) -> Iterator[tuple[str, float]]:
    time.sleep(_REST_S)
    pid = lmx.wait_model(model)
    at = time.time()
    os.kill(pid, signal.SIGKILL)
    yield "worker: SIGKILL to death seen", lmx.wait_event("process_exited", pid=pid)["ts"] - at
    lmx.wait_model(model, other_than=_incarnation(lmx, pid))
    started, ready = _next_life(lmx, pid, "model_readiness_changed")
    yield "worker: SIGKILL to next process started", started - at
    yield "worker: SIGKILL to ready again", ready - at


def _kill_gateway(lmx: Lmx) -> Iterator[tuple[str, float]]:
    time.sleep(_REST_S)
    document = lmx.status()
    assert document is not None
    pid, url = document["gateway"]["pid"], document["gateway"]["url"]
    at = time.time()
    os.kill(pid, signal.SIGKILL)
    with urllib.request.urlopen(f"{url}/healthz", timeout=30) as response:
        response.read()
    answered = time.time()
    lmx.wait_status(lambda doc: doc["gateway"]["state"] == "ready" and doc["gateway"]["pid"] != pid)
    started, ready = _next_life(lmx, pid, "gateway_state_changed")
    yield "gateway: process started to serving", ready - started
    yield "gateway: SIGKILL to next answer", answered - at


def _ask_status(lmx: Lmx) -> Iterator[tuple[str, float]]:
    at = time.perf_counter()
    lmx.cli("status", "--json")
    yield "`lmx-supervisor status`", time.perf_counter() - at


def _incarnation(lmx: Lmx, pid: int) -> int:
    return int(lmx.wait_event("process_exited", pid=pid)["incarnation"])


def _next_life(lmx: Lmx, pid: int, changed: str) -> tuple[float, float]:
    """Return when the process after `pid` was started and when it was ready, by the journal's clock."""
    journal = lmx.journal()
    ended = next(entry for entry in journal if entry["event"] == "process_exited" and entry["pid"] == pid)
    later = [entry for entry in journal if entry["ts"] >= ended["ts"] and entry.get("model") == ended["model"]]
    started = next(entry for entry in later if entry["event"] == "process_started")
    ready = next(
        entry
        for entry in later
        if entry["event"] == changed and entry["state"] == "ready" and entry["pid"] == started["pid"]
    )
    return started["ts"], ready["ts"]


# -- with and without the spare -----------------------------------------------------------------------------------


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="A model's recovery with the warm spare and without, as a ratio.")
    parser.add_argument("--model", type=Path, help="an MLX model folder (default: a tiny random model)")
    parser.add_argument("--kills", type=at_least_one, default=7, help="of each of the two (default: 7)")
    args = parser.parse_args()
    end_cleanly()
    work = Path(tempfile.mkdtemp(prefix="lmx-bench-", dir="/tmp"))
    hosts = {"with": Lmx(**AT_ONCE, LMX_WORKER__SPARE="true"), "without": Lmx(**AT_ONCE, LMX_WORKER__SPARE="false")}
    try:
        folder = args.model or make_tiny_model(work / "tiny")
        for lmx in hosts.values():
            lmx.start()
            lmx.load(folder, MODEL)
        deaths = measure_recovery(hosts["without"], MODEL, args.kills, lambda text: print(text, file=sys.stderr))
        found: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
        for number in range(args.kills):
            print(f"kill {number + 1}/{args.kills}", file=sys.stderr)
            for name in ("with", "without") if number % 2 else ("without", "with"):
                found[name].append(_recover(hosts[name], spare=name == "with"))
    finally:
        for lmx in hosts.values():
            lmx.close()
        shutil.rmtree(work, ignore_errors=True)
    print(deaths_table(deaths))
    print(spare_table(found))
    return 0


def _recover(lmx: Lmx, *, spare: bool) -> tuple[float, float]:
    """Kill the model; return seconds until it was ready again, and of those what its load took."""
    if spare:
        lmx.wait_status(lambda doc: doc["spare"]["state"] == "ready")
    time.sleep(_REST_S)
    pid = lmx.wait_model(MODEL)
    at = time.time()
    os.kill(pid, signal.SIGKILL)
    lmx.wait_model(MODEL, other_than=_incarnation(lmx, pid))
    _, ready = _next_life(lmx, pid, "model_readiness_changed")
    lines = [json.loads(line) for file in (lmx.home / "logs").glob(f"{MODEL}-*.log") for line in file.open()]
    loads = [line["load_s"] for line in lines if line["event"] == "worker_ready"]
    return ready - at, float(loads[-1])


def deaths_table(found: dict[str, list[float]]) -> str:
    """Return the Markdown table of what `measure_recovery` returned."""
    rows = ["| | median ms | lowest to highest |", "|---|---|---|"]
    rows += [f"| {name} | {median(of):.0f} | {min(of):.0f} to {max(of):.0f} |" for name, of in found.items()]
    return "\n".join([*rows, ""])


def spare_table(found: dict[str, list[tuple[float, float]]]) -> str:
    """Return the Markdown table of (recovery, load) seconds by "with" and "without"."""
    rows = ["| spare | SIGKILL to ready again, median s | lowest to highest | load, median s |", "|---|---|---|---|"]
    for name, measured in found.items():
        took = [seconds for seconds, _ in measured]
        load = median(seconds for _, seconds in measured)
        rows.append(f"| {name} | {median(took):.2f} | {min(took):.2f} to {max(took):.2f} | {load:.2f} |")
    ready = {name: median(seconds for seconds, _ in measured) for name, measured in found.items()}
    beyond = median(seconds - load for seconds, load in found["with"])
    words = (
        f"With the spare it takes **{ready['with'] / ready['without']:.2f}** of the time without, over "
        f"{len(found['with'])} kills each. Beyond the load itself it takes {beyond:.2f} s with the spare "
        f"(median; allowed: {ALLOWED_S} s)."
    )
    return "\n".join([*rows, "", words])


if __name__ == "__main__":
    sys.exit(main())
