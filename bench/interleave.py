"""How long a long prompt makes running streams wait: the time between their tokens beside it and without it.

Streams decode in the batch of a worker, in this process; once they all do, a long prompt comes. What counts is the 99th
percentile of the time between two of their tokens while that prompt is processed. Allowed is three times what it is
without, plus one chunk of prefill: the longest that the same prompt has when it is alone, before or after. Times are
CPU time of this process with one thread of the matrix library, so that a busy machine disturbs them little. The table
goes to stdout, progress to stderr. `python bench/interleave.py --help`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.measures import percentile
from bench.options import at_least_one
from supervisor.environment import worker_environment
from supervisor.platform.blas import find_blas
from tests.modelkit import make_tiny_model

if TYPE_CHECKING:
    from worker.batch import BatchBackend

_CHUNK: Final = 512
_ALLOWED: Final = 3.0
_SHARE: Final = 0.99
_LONG: Final = 1_000


def timed_step(backend: "BatchBackend") -> tuple[float, set[int]]:
    """Return the seconds of one step, and the jobs that got a token in it."""
    began = time.process_time()
    answered = {job for job, _, _ in backend.step()}
    return time.process_time() - began, answered


def alone(backend: "BatchBackend", prompt: list[int]) -> list[float]:
    """Return the seconds of each chunk of a prompt that nothing else runs beside."""
    from worker.jobs import Job

    sys.stderr.write("the long prompt alone\n")
    backend.insert(Job(_LONG, prompt, 1))
    chunks = []
    while len(backend):
        chunks.append(timed_step(backend)[0])
    sys.stderr.write(f"{', '.join(f'{seconds * 1000:.0f}' for seconds in chunks)} ms\n")
    return chunks


def measure(folder: Path, streams: int, steps: int, length: int) -> tuple[float, float, float, int]:
    """Return seconds: 99th percentile without, the longest chunk alone, 99th percentile beside; and steps beside."""
    from mlx_lm.utils import load_model

    from worker.batch import BatchBackend
    from worker.jobs import Job

    model, _ = load_model(folder)
    backend = BatchBackend(model, (), slots=32, prefill_tokens=_CHUNK)
    prompt = [300 + number % 997 for number in range(length)]
    backend.generate(prompt[: 2 * _CHUNK], 1)  # compiles what is compiled
    chunks = alone(backend, prompt)
    sys.stderr.write("streams without it\n")
    for number in range(streams):
        backend.insert(Job(number, [400 + number] * 30, 100_000, client=str(number)))
    answered: set[int] = set()
    while len(answered) < streams:
        answered |= timed_step(backend)[1]
    without = [timed_step(backend)[0] for _ in range(steps)]
    sys.stderr.write("streams beside it\n")
    backend.insert(Job(_LONG, prompt, 1, client="long"))
    beside: list[float] = []
    answered = set()
    while _LONG not in answered:
        seconds, answered = timed_step(backend)
        if not set(range(streams)) <= answered:
            raise SystemExit("interleave: a stream got no token in a step")
        beside.append(seconds)
    sys.stderr.write(f"{', '.join(f'{seconds * 1000:.0f}' for seconds in beside)} ms\n")
    backend.remove([*range(streams)])
    chunks += alone(backend, prompt)
    return percentile(without, _SHARE), max(chunks), percentile(beside, _SHARE), len(beside)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="an MLX model folder (default: a tiny random model)")
    parser.add_argument("--streams", type=at_least_one, default=4, help="streams that run (default: 4)")
    parser.add_argument("--steps", type=at_least_one, default=200, help="steps without the long prompt (default: 200)")
    parser.add_argument("--tokens", type=at_least_one, default=6000, help="tokens of the long prompt (default: 6000)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="lmx-bench-", dir="/tmp"))
    try:
        if not args.inside:  # the matrix library has to be there before the process is
            environment = worker_environment(os.environ, find_blas(work), 1)
            return subprocess.call(
                [sys.executable, "-m", "bench.interleave", "--inside", *sys.argv[1:]], env=environment
            )
        folder = args.model or make_tiny_model(work / "tiny")
        without, chunk, beside, steps = measure(folder, args.streams, args.steps, args.tokens)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    allowed = _ALLOWED * without + chunk
    print("| streams | prompt | p99 without, ms | longest chunk, ms | p99 beside, ms | allowed, ms | steps beside |")
    print("|---|---|---|---|---|---|---|")
    figures = " | ".join(f"{each * 1000:.0f}" for each in (without, chunk, beside, allowed))
    print(f"| {args.streams} | {args.tokens} | {figures} | {steps} |")
    return beside > allowed


if __name__ == "__main__":
    sys.exit(main())
