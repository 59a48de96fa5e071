"""Ten times more requests than a model can serve: who is answered, who is refused and how soon, what the gateway holds.

First the capacity is measured: as many streams as there are slots, each asking again when its answer is complete. Then
requests arrive at ten times that rate for a minute, whatever becomes of the earlier ones, each on a connection of its
own. Every one of them must end: with its whole answer, or with 429 or 503 within the time for a slot. The table goes
to stdout, progress to stderr. `python -m bench.overload --help`.
"""

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from bench.load import make_request, run_load
from bench.options import at_least_one, end_cleanly
from bench.workloads import Workload, prompt
from tests.harness import Lmx
from tests.modelkit import make_tiny_model

MODEL: Final = "bench"
#: Above what the slot timeout allows: the way through a busy machine.
_GRACE_S: Final = 5.0
_PATIENCE_S: Final = 180.0
_CAPACITY_S: Final = 6.0
_REFUSED: Final = frozenset({429, 503})


class Ending(NamedTuple):
    """How one request ended: HTTP status, 0 without one; whole or not; seconds to the head and to the end."""

    status: int
    whole: bool
    head_s: float
    end_s: float


class Crowd:
    """Sends requests, each on a connection of its own, and notes how they end."""

    def __init__(self, url: str, tokens: int) -> None:
        self._place = urlsplit(url)
        self._workload = Workload("overload", 1, tokens)
        self.endings: list[Ending] = []

    def _request(self, number: int) -> bytes:
        return make_request(self._place.netloc, MODEL, self._workload, prompt(self._workload, number, 0))

    async def ask(self, number: int) -> None:
        began = time.perf_counter()
        status, whole, head_s = 0, False, 0.0
        try:
            async with asyncio.timeout(_PATIENCE_S):
                reader, writer = await asyncio.open_connection(self._place.hostname, self._place.port)
                writer.write(self._request(number))
                status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
                head_s = time.perf_counter() - began
                tail = b""
                while status == 200 and (data := await reader.read(65536)):
                    tail = (tail + data)[-64:]
                    if b"data: [DONE]" in tail:
                        whole = True
                        break
                writer.close()
        except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError) as error:
            sys.stderr.write(f"overload: request {number}: {type(error).__name__}\n")
        self.endings.append(Ending(status, whole, head_s, time.perf_counter() - began))


async def overload(lmx: Lmx, rate: float, seconds: float, tokens: int) -> tuple[list[Ending], list[int]]:
    """Send requests at a rate for so long; return how they ended, and the gateway's bytes once a second."""
    crowd = Crowd(lmx.url, tokens)
    memory: list[int] = []
    watching = asyncio.create_task(_watch(lmx, memory))
    began = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for number in range(int(rate * seconds)):
                await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
                group.create_task(crowd.ask(number))
    finally:
        watching.cancel()
    return crowd.endings, memory


async def _watch(lmx: Lmx, memory: list[int]) -> None:
    while True:
        document = await asyncio.to_thread(lmx.status)
        if document is not None and document["gateway"]["memory_bytes"]:
            memory.append(document["gateway"]["memory_bytes"])
        await asyncio.sleep(1)


def judge(endings: list[Ending], sent: int, slot_timeout_s: float) -> list[str]:
    """Return what was promised and not kept."""
    broken = []
    if len(endings) != sent:
        broken.append(f"{sent - len(endings)} requests never ended")
    if lost := sum(e.status == 200 and not e.whole for e in endings):
        broken.append(f"{lost} accepted requests did not complete")
    if other := sum(e.status not in {200, *_REFUSED} for e in endings):
        broken.append(f"{other} ended with neither an answer nor 429 or 503")
    late = max((e.end_s for e in endings if e.status in _REFUSED), default=0.0)
    if late > slot_timeout_s + _GRACE_S:
        broken.append(f"a refusal took {late:.1f} s")
    return broken


def table(endings: list[Ending], memory: list[int], capacity: float, rate: float, seconds: float) -> str:
    whole = [e for e in endings if e.whole]
    refused = sorted(e.end_s for e in endings if e.status in _REFUSED)
    heads = sorted(e.head_s for e in whole)
    mib = 1024**2
    early, late = memory[len(memory) // 4 : len(memory) // 2], memory[-len(memory) // 4 :]
    rows: list[tuple[str, Any]] = [
        ("capacity, requests/s", f"{capacity:.1f}"),
        (f"offered for {seconds:.0f} s, requests/s", f"{rate:.1f}"),
        ("requests", len(endings)),
        ("accepted, all complete", len(whole)),
        ("refused with 429 or 503", len(refused)),
        ("served, requests/s", f"{len(whole) / max(seconds, 1):.1f}"),
        ("accepted: median and largest s to the head", f"{median(heads or [0]):.2f}, {max(heads or [0]):.2f}"),
        ("refused: median and largest s", f"{median(refused or [0]):.3f}, {max(refused or [0]):.2f}"),
        ("gateway MiB: second quarter, last quarter, largest",
         f"{median(early or [0]) / mib:.0f}, {median(late or [0]) / mib:.0f}, {max(memory or [0]) / mib:.0f}"),
    ]  # fmt: skip
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="an MLX model folder (default: a tiny random model)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long requests come (default: 60)")
    parser.add_argument("--factor", type=float, default=10.0, help="times the capacity (default: 10)")
    parser.add_argument("--tokens", type=at_least_one, default=512, help="tokens of each answer (default: 512)")
    parser.add_argument("--slots", type=at_least_one, default=32, help="max_concurrent_requests (default: 32)")
    parser.add_argument("--slot-timeout", type=float, default=30.0, help="seconds to wait for a slot (default: 30)")
    args = parser.parse_args()
    end_cleanly()
    work = Path(tempfile.mkdtemp(prefix="lmx-bench-", dir="/tmp"))
    lmx = Lmx(LMX_MODELS__MAX_CONCURRENT_REQUESTS=str(args.slots), LMX_MODELS__SLOT_TIMEOUT_S=str(args.slot_timeout))
    try:
        folder = args.model or make_tiny_model(work / "tiny")
        lmx.start()
        lmx.load(folder, MODEL)
        sys.stderr.write("capacity\n")
        asyncio.run(run_load(lmx.url, MODEL, Workload("warm-up", args.slots, args.tokens)))
        began, requests = time.perf_counter(), 0
        while time.perf_counter() - began < _CAPACITY_S:
            asyncio.run(run_load(lmx.url, MODEL, Workload("capacity", args.slots, args.tokens, 2)))
            requests += 2 * args.slots
        capacity = requests / (time.perf_counter() - began)
        rate = capacity * args.factor
        sys.stderr.write(f"{capacity:.1f} requests/s; now {rate:.1f} requests/s for {args.seconds:.0f} s\n")
        endings, memory = asyncio.run(overload(lmx, rate, args.seconds, args.tokens))
    finally:
        lmx.close()
        shutil.rmtree(work, ignore_errors=True)
    print(table(endings, memory, capacity, rate, args.seconds))
    broken = judge(endings, int(rate * args.seconds), args.slot_timeout)
    print("\n" + ("; ".join(broken) if broken else "Everything that was promised was kept."))
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
