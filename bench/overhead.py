"""What it costs that models run behind a supervisor, a gateway and a socket: LMX against its own engine in-process.

Both run in turns, in one session, on the same model folder with the same matrix library and batch sizes, so that a
noisy machine disturbs both. A measurement during which other processes took more than a little of the machine is
repeated. The table goes to stdout, progress to stderr. `make bench`, or `python bench/overhead.py --help`.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import psutil

from bench.recovery import AT_ONCE, measure_recovery
from protocol import __version__
from supervisor.environment import worker_environment
from supervisor.platform.blas import find_blas
from tests.harness import Lmx
from tests.modelkit import make_tiny_model

ROOT: Final = Path(__file__).resolve().parents[1]
MODEL: Final = "bench"
#: Share of the machine that others may take during a measurement, and how often it is tried again.
_DISTURBED: Final = 0.10
_TRIES: Final = 3
#: Before a measurement the machine should be as idle as this for a moment; it is waited for, but not for ever.
_QUIET_PERCENT: Final = 15.0
_QUIET_SAMPLE_S: Final = 0.5
_QUIET_SAMPLES: Final = 30
#: A measurement takes about this many tokens, so that starting and ending do not count for much.
_TOKENS_PER_STREAM: Final = {1: 2048, 4: 2048}
_TOKENS_OTHERWISE: Final = 1536

Measured = dict[str, Any]


def main() -> int:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    work = Path(tempfile.mkdtemp(prefix="lmx-bench-", dir="/tmp"))
    lmx = Lmx(**AT_ONCE, LMX_WORKER__BLAS_THREADS=str(args.blas_threads))
    try:
        folder = args.model or make_tiny_model(work / "tiny")
        report = run(lmx, folder, work, args)
    finally:
        lmx.close()
        shutil.rmtree(work, ignore_errors=True)
    print(markdown(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="an MLX model folder (default: a tiny random model)")
    parser.add_argument("--streams", default="1,4,16", help="numbers of streams (default: 1,4,16)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each answer (default: 256)")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds (default: 3)")
    parser.add_argument("--requests", type=int, help="requests of a stream in a round (default: a few seconds' worth)")
    parser.add_argument("--repetitions", type=int, default=5, help="kills in the recovery part; 0: none (default: 5)")
    parser.add_argument("--blas-threads", type=int, default=1, help="threads of the CPU matrix library (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    args = parser.parse_args()
    args.streams = [int(number) for number in args.streams.split(",")]
    return args


def run(lmx: Lmx, folder: Path, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    say(f"starting LMX and the engine in-process on {folder}")
    lmx.start().load(folder, MODEL)
    contenders: dict[str, Contender] = {
        "in-process": InProcess(folder, work, args.blas_threads),
        "LMX": Served(lmx),
    }
    results: dict[int, dict[str, list[Measured]]] = {}
    try:
        for name, contender in contenders.items():
            say(f"warm-up of {name}")
            contender.measure(streams=max(args.streams), tokens=64, requests=2)
            contender.measure(streams=1, tokens=256, requests=2)
        for streams in args.streams:
            wanted = args.requests or max(1, _TOKENS_PER_STREAM.get(streams, _TOKENS_OTHERWISE) // args.tokens)
            results[streams] = {name: [] for name in contenders}
            for number in range(args.rounds):
                names = list(contenders) if number % 2 == 0 else list(contenders)[::-1]
                for name in names:
                    say(f"{streams} streams, round {number + 1}/{args.rounds}, {name}", end=" ")
                    measured = undisturbed(contenders[name], streams=streams, tokens=args.tokens, requests=wanted)
                    say(f"{rate(measured):.0f} tok/s")
                    results[streams][name].append(measured)
    finally:
        for contender in contenders.values():
            contender.close()
    recovery = measure_recovery(lmx, MODEL, args.repetitions, say) if args.repetitions else {}
    return {
        "schema": "lmx.bench.overhead/1",
        "version": __version__,
        "machine": f"{psutil.cpu_count()} cores {platform.machine()}, {platform.system()}",
        "model": str(args.model or "tiny"),
        "tokens": args.tokens,
        "blas_threads": args.blas_threads,
        "throughput": results,
        "recovery_ms": recovery,
    }


# -- the two that are compared --------------------------------------------------------------------------------------


class Contender:
    """Something that generates: measured by wall clock, and by the CPU seconds of each of its `parts`."""

    def measure(self, *, streams: int, tokens: int, requests: int) -> Measured:
        """Return seconds, tokens, ttft_s, and under `cpu_s` what each part and everybody else used."""
        parts = self.parts()
        busy, before, own = busy_s(), time.monotonic(), {name: used_s(pid) for name, pid in parts.items()}
        clients = os.times().children_user + os.times().children_system
        measured = self.run(streams=streams, tokens=tokens, requests=requests)
        cpu = {name: used_s(pid) - own[name] for name, pid in parts.items()}
        cpu["client"] = os.times().children_user + os.times().children_system - clients
        others = busy_s() - busy - sum(cpu.values())
        wall = time.monotonic() - before
        return {**measured, "cpu_s": cpu, "others": max(0.0, others / wall / (psutil.cpu_count() or 1))}

    def parts(self) -> dict[str, int]:
        """Return the pids of the processes that work, by name."""
        raise NotImplementedError

    def run(self, *, streams: int, tokens: int, requests: int) -> Measured:
        """Generate once."""
        raise NotImplementedError

    def close(self) -> None:
        """End what was started for this."""


class InProcess(Contender):
    """`bench.inprocess`, one process for all rounds, with the environment of a worker."""

    def __init__(self, folder: Path, work: Path, blas_threads: int) -> None:
        environ = worker_environment(os.environ, find_blas(work / "blas"), blas_threads)
        command = [sys.executable, "-m", "bench.inprocess", str(folder)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def parts(self) -> dict[str, int]:
        return {"engine": self._process.pid}

    def run(self, *, streams: int, tokens: int, requests: int) -> Measured:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"streams": streams, "tokens": tokens, "requests": requests}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer: Measured = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        self._process.communicate()


class Served(Contender):
    """LMX, asked by `bench.load` in a process of its own."""

    def __init__(self, lmx: Lmx, key: str = "") -> None:
        self._lmx = lmx
        self._key = key
        self._url = lmx.url

    def parts(self) -> dict[str, int]:
        document = self._lmx.status()
        assert document is not None
        assert self._lmx.process is not None
        worker = self._lmx.model(MODEL)["pid"]
        return {"worker": worker, "gateway": document["gateway"]["pid"], "supervisor": self._lmx.process.pid}

    def run(self, *, streams: int, tokens: int, requests: int) -> Measured:
        command = [sys.executable, "-m", "bench.load", self._url, MODEL]
        command += ["--streams", str(streams), "--tokens", str(tokens), "--requests", str(requests)]
        command += ["--key", self._key] if self._key else []
        answer: Measured = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
        return answer


def undisturbed(contender: Contender, *, streams: int, tokens: int, requests: int) -> Measured:
    """Return the measurement that others disturbed least: the first that they left alone."""
    tries: list[Measured] = []
    while len(tries) < _TRIES and not (tries and tries[-1]["others"] < _DISTURBED):
        if tries:
            say(f"(others took {tries[-1]['others']:.0%}, again)", end=" ")
        any(psutil.cpu_percent(_QUIET_SAMPLE_S) < _QUIET_PERCENT for _ in range(_QUIET_SAMPLES))
        tries.append(contender.measure(streams=streams, tokens=tokens, requests=requests))
    return min(tries, key=lambda measured: measured["others"])


def busy_s() -> float:
    """Return the CPU seconds the machine has spent on anything."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))


def used_s(pid: int) -> float:
    """Return the CPU seconds of a process."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


# -- the report -----------------------------------------------------------------------------------------------------


def markdown(report: dict[str, Any]) -> str:
    lines = [
        f"LMX {report['version']}, {report['machine']}, model {report['model']}, {report['tokens']} tokens an answer.",
        "Medians (lowest to highest) over the rounds; the ratios are of the medians, and of the best rounds.",
        "",
        "| streams | in-process tok/s | LMX tok/s | ratio | of best | in-process TTFT ms | LMX TTFT ms | added ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for streams, rounds in report["throughput"].items():
        limit, lmx = rounds["in-process"], rounds["LMX"]
        ratio = median(map(rate, lmx)) / median(map(rate, limit))
        best = max(map(rate, lmx)) / max(map(rate, limit))
        added = median(map(ttft_ms, lmx)) - median(map(ttft_ms, limit))
        cells = [streams, spread(limit, rate), spread(lmx, rate), f"**{ratio:.2f}**", f"{best:.2f}"]
        cells += [spread(limit, ttft_ms, 1), spread(lmx, ttft_ms, 1), f"{added:+.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "CPU ms per 1,000 tokens, and the share of the machine that others took.", ""]
    lines += ["| streams | in-process | worker | gateway | client | others |", "|---|---|---|---|---|---|"]
    for streams, rounds in report["throughput"].items():
        cells = [cpu_ms(rounds["in-process"], "engine")]
        cells += [cpu_ms(rounds["LMX"], part) for part in ("worker", "gateway", "client")]
        others = max(measured["others"] for contender in rounds.values() for measured in contender)
        lines.append(f"| {streams} | " + " | ".join(f"{cell:.0f}" for cell in cells) + f" | at most {others:.0%} |")
    if report["recovery_ms"]:
        lines += ["", "| | median ms | lowest to highest |", "|---|---|---|"]
        for name, values in report["recovery_ms"].items():
            lines.append(f"| {name} | {median(values):.0f} | {min(values):.0f} to {max(values):.0f} |")
    return "\n".join(lines)


def spread(rounds: Sequence[Measured], of: Callable[[Measured], float], digits: int = 0) -> str:
    values = [of(measured) for measured in rounds]
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def rate(measured: Measured) -> float:
    return float(measured["tokens"] / measured["seconds"])


def ttft_ms(measured: Measured) -> float:
    return float(median(measured["ttft_s"]) * 1000)


def cpu_ms(rounds: Sequence[Measured], part: str) -> float:
    return float(median(measured["cpu_s"][part] / measured["tokens"] * 1e6 for measured in rounds))


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
