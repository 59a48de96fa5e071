"""Has it become slower? `make perf-gate` compares ratios of a short run with `bench/baseline.json`.

Every figure is CPU time of ours over CPU time of something else in the same run (the engine in-process, a fixed piece
of Python, a bare interpreter), or a number of calls, or memory: wall time would tell who else uses the machine. Parts
with a figure worse than the baseline by more than the tolerance are measured once more; if it still is, the code is
1. `--short` is for CI: what can be told while others use the machine too.

`LMX_PERF_BASELINE` names another machine's file, `LMX_PERF_TOLERANCE` another share than 0.15. `--update` writes.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from bench import peers
from bench.alone import Alone
from bench.compare import head
from bench.contenders import InProcess, Lmx
from bench.measures import resident_bytes
from bench.options import at_least_one, end_cleanly
from bench.workloads import Workload
from supervisor.environment import worker_environment
from supervisor.platform.blas import find_blas

_BASELINE: Final = Path(__file__).with_name("baseline.json")
_TOLERANCE: Final = 0.15
_MIB: Final = 1024**2
#: Measurements of which the highest becomes the baseline.
_UPDATES: Final = 3
#: Steps a second that a busy machine keeps up with, so that each token is an event of its own.
_STEPS: Final = "100"
Figures = dict[str, float]


class BadBaselineError(Exception):
    """There is nothing to compare with."""


class _Baseline(msgspec.Struct):
    figures: Figures


class Least:
    """The least of what was measured under a name. What disturbs makes CPU times longer, never shorter."""

    def __init__(self) -> None:
        self._least: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        """Note a value."""
        self._least[name] = min(value, self._least.get(name, value))

    def of(self, name: str) -> float:
        """Return the least of a name."""
        return self._least[name]

    def names(self) -> list[str]:
        """Return the names that have a value."""
        return list(self._least)


def verdict(found: Mapping[str, float], baseline: Mapping[str, float], tolerance: float) -> list[str]:
    """Return the names of the figures that are worse than allowed: lower is better for all of them.

    A figure without a baseline passes; so does one of the baseline that was not measured. What is no number does not.
    """
    return [name for name, value in found.items() if name in baseline and not value <= baseline[name] * (1 + tolerance)]


def outgrown(found: Mapping[str, float], baseline: Mapping[str, float], tolerance: float) -> list[str]:
    """Return the names of the counts that are so much better that their baseline would let a regression pass.

    Only counts are the same on a quiet machine and on a busy one.
    """
    counts = {name: value for name, value in found.items() if name.startswith("modules") or name.endswith("calls")}
    return [name for name, value in counts.items() if name in baseline and value < baseline[name] * (1 - tolerance)]


def table(found: Mapping[str, float], baseline: Mapping[str, float], tolerance: float) -> str:
    """Return what was found beside what was expected."""
    bad = set(verdict(found, baseline, tolerance))
    lines = ["| figure | found | baseline | |", "|---|---|---|---|"]
    for name, value in found.items():
        was = baseline.get(name)
        if was is None:
            lines.append(f"| {name} | {value:.3g} | – | |")
            continue
        words = f"{value / was - 1:+.0%}"
        lines.append(f"| {name} | {value:.3g} | {was:.3g} | {f'**{words}: too much**' if name in bad else words} |")
    return "\n".join(lines)


def work_s() -> float:
    """Return the CPU seconds of a fixed piece of Python, of the kind that the gateway does: our unit."""
    began = time.thread_time()
    for _ in range(3):
        kept: dict[int, bytes] = {}
        for number in range(12_000):
            kept[number % 512] = b"data: %b\n\n" % msgspec.json.encode({"n": number, "text": f"word {number}"})
        if len(kept) != 512:
            raise AssertionError
    return time.thread_time() - began


def read_tolerance(given: str | float) -> float:
    """Return the share that a figure may be worse. Raises `ValueError` unless it is from 0 up to 10."""
    with contextlib.suppress(ValueError):
        if 0 <= (tolerance := float(given)) <= 10:
            return tolerance
    raise ValueError(f"LMX_PERF_TOLERANCE: {given!r} is no share like 0.15")


def child_cpu_s(command: list[str], environ: Mapping[str, str] | None = None) -> float:
    """Return the CPU seconds of a command from its start to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environ, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _starts(rounds: int) -> Figures:
    """Imports of gateway and command line, over those of an interpreter with a library that both need."""
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    python = [sys.executable, "-P", "-c"]
    programs = {
        "start of the gateway": "import gateway.__main__",
        "start of the command line": "import supervisor.cli",
    }
    least = Least()
    for _ in range(2 * rounds + 1):
        least.add("bare", child_cpu_s([*python, "import json, msgspec"], environ))
        for name, program in programs.items():
            least.add(name, child_cpu_s([*python, program], environ))
    return {f"{name}, CPU over a bare start": least.of(name) / least.of("bare") for name in programs}


def _modules() -> Figures:
    """How many modules the same imports bring: that is the same on every machine, and nearly what they take."""
    programs = {"gateway": "gateway.__main__", "command line": "supervisor.cli"}
    found: Figures = {}
    for name, module in programs.items():
        program = f"import {module}, sys; print(len(sys.modules))"
        done = subprocess.run([sys.executable, "-P", "-c", program], check=True, stdout=subprocess.PIPE)
        found[f"modules at the start of the {name}"] = float(done.stdout)
    return found


def _alone(work: Path, rounds: int) -> Figures:
    """The gateway and the IO thread before a worker without a model."""
    alone = Alone(work, _STEPS, LMX_MODELS__GATHER_S="0")
    least = Least()
    try:
        alone.ask(Workload("warm-up", 64, 32))
        for _ in range(rounds):
            least.add("unit", work_s())
            streams = alone.ask(Workload("streams", 64, 150))
            requests = alone.ask(Workload("requests", 8, 1, 25))
            least.add("unit", work_s())
            for part in ("gateway", "worker"):
                each = streams["cpu_s"][part] / streams["events"]
                least.add(f"{part}: CPU of 10,000 events, in units", each * 1e4)
                each = requests["cpu_s"][part] / requests["requests"]
                least.add(f"{part}: CPU of 100 short requests, in units", each * 100)
    finally:
        alone.host.close()
    return {name: least.of(name) / least.of("unit") for name in least.names() if name != "unit"}


def _engine(work: Path, rounds: int) -> Figures:
    """What generating costs in a worker, over the same batch in-process."""
    folder, preload = peers.tiny_model(work / "tiny"), find_blas(work / "blas")
    engine, lmx = InProcess(folder, preload, 1, lean=True), Lmx(folder, preload, 1)
    workload = Workload("16 streams", 16, 96)
    least = Least()
    try:
        for contender in (engine, lmx):
            contender.start()
            contender.measure(Workload("warm-up", 16, 16))
        for number in range(rounds):
            for contender in (engine, lmx) if number % 2 else (lmx, engine):
                measured = contender.measure(workload)
                part = "engine" if contender is engine else "worker"
                least.add(part, measured["cpu_s"][part] / measured["tokens"])
    finally:
        engine.close()
        lmx.close()
    return {"worker: CPU of a token over in-process": least.of("worker") / least.of("engine")}


def _run_paths(*options: str, environ: Mapping[str, str] | None = None) -> Figures:
    command = [sys.executable, "-P", "-m", "bench.paths", *options]
    found: Figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environ).stdout)
    return found


def _batch(work: Path, rounds: int) -> Figures:
    """The batch of the worker, beside mlx-lm's in the same process."""
    environ = worker_environment(os.environ, find_blas(work / "blas"), 1)
    folder = peers.tiny_model(work / "tiny")
    return _run_paths("--engine", str(folder), "--rounds", str(3 * rounds), environ=environ)


def _memory(work: Path, _rounds: int) -> Figures:
    """What each process has in memory at the start, without a model."""
    alone = Alone(work, _STEPS)
    try:
        return {f"memory at start: {part}, MiB": resident_bytes(pid) / _MIB for part, pid in alone.host.pids().items()}
    finally:
        alone.host.close()


PARTS: Final[Mapping[str, Callable[[Path, int], Figures]]] = {
    "paths": lambda _work, _rounds: _run_paths(),
    "batch": _batch,
    "modules": lambda _work, _rounds: _modules(),
    "starts": lambda _work, rounds: _starts(rounds),
    "memory": _memory,
    "engine": _engine,
    "alone": _alone,
}
#: What can be told on a machine that others use too.
SHORT: Final = ("paths", "batch", "modules", "memory")


def measure(work: Path, rounds: int, parts: Sequence[str], say: Callable[[str], None]) -> dict[str, Figures]:
    """Return the figures of each of these parts."""
    found: dict[str, Figures] = {}
    for part in parts:
        say(f"perf-gate: {part}")
        with tempfile.TemporaryDirectory(dir=work) as folder:
            found[part] = PARTS[part](Path(folder), rounds)
    return found


def merged(found: Mapping[str, Figures]) -> Figures:
    """Return the figures of all parts."""
    return {name: value for figures in found.values() for name, value in figures.items()}


def judge(
    found: dict[str, Figures], baseline: Figures, tolerance: float, again: Callable[[list[str]], dict[str, Figures]]
) -> Figures:
    """Return the figures of all parts; of those with a figure that is worse the better one of two measurements."""
    bad = [part for part, figures in found.items() if verdict(figures, baseline, tolerance)]
    second = again(bad) if bad else {}
    figures: Figures = {}
    for part, first in found.items():
        other = second.get(part, {})
        figures |= {name: min(value, other.get(name, value)) for name, value in first.items()}
    return figures


def read_baseline(file: Path) -> Figures:
    """Return the figures of a baseline. Raises `BadBaselineError`: a gate without one is always open."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Baseline).figures
    except (OSError, msgspec.DecodeError) as error:
        raise BadBaselineError(f"{file} is no baseline: {error}; --update writes one") from None


def highest(several: Sequence[Figures]) -> Figures:
    """Return the highest of each figure: how much one may vary while others use the machine is no regression."""
    return {name: max(one[name] for one in several) for name in several[0]}


def main() -> int:
    """Measure, compare, say."""
    parser = argparse.ArgumentParser(prog="perf-gate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=at_least_one, default=3)
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    parser.add_argument("--short", action="store_true", help="what a busy machine can tell: " + ", ".join(SHORT))
    parser.add_argument("--update", action="store_true", help="write what is found into the baseline")
    args = parser.parse_args()
    end_cleanly()
    file = Path(os.environ.get("LMX_PERF_BASELINE") or _BASELINE)
    parts = SHORT if args.short else args.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts: there is no {', '.join(unknown) or 'name'}: one of {', '.join(PARTS)}")
    try:
        tolerance = read_tolerance(os.environ.get("LMX_PERF_TOLERANCE") or _TOLERANCE)
        baseline = {} if args.update and not file.exists() else read_baseline(file)
    except (BadBaselineError, ValueError) as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory(prefix="lmx-gate-", dir="/tmp") as work:

        def again(parts: Sequence[str]) -> dict[str, Figures]:
            return measure(Path(work), args.rounds, parts, lambda text: print(text, file=sys.stderr, flush=True))

        if args.update:
            several = [merged(again(parts)) for _ in range(_UPDATES)]
        else:
            found = judge(again(parts), baseline, tolerance, again)
    if args.update:
        found = highest(several)
        file.write_text(json.dumps({**head(), "figures": {**baseline, **found}}, indent=1) + "\n")
    print(table(found, baseline, tolerance))
    if args.update:
        return 0
    if old := outgrown(found, baseline, tolerance):
        print(f"perf-gate: far better than the baseline, which hides what comes next; --update it: {', '.join(old)}")
    return 1 if verdict(found, baseline, tolerance) else 0


if __name__ == "__main__":
    sys.exit(main())
