"""100,000 requests without growth: `python -m bench.soak`, before a worker without a model.

Every request is a stream of a few tokens; some clients leave in the middle, some send nonsense. Descriptors, threads
and memory of gateway, worker and supervisor are noted every so often; in the end descriptors and threads have to be
what they were after the first tenth, and memory within a share of it.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import psutil
import uvloop

from bench.alone import Alone
from bench.measures import resident_bytes
from bench.options import at_least_one, end_cleanly

_MODEL: Final = "null"
_CLIENTS: Final = 16
_LEAVES_EVERY: Final = 50
_NONSENSE_EVERY: Final = 97
_MIB: Final = 1024**2
_PARTS: Final = 10
#: Memory at the end, of that after the first tenth: allocators keep some of what a burst needed.
GROWTH: Final = 1.15
#: Descriptors and threads that may be more at the end: a connection of the last moment.
SLACK: Final = 3
_SETTLE_S: Final = 2.0
Sample = dict[str, dict[str, float]]


def look(pids: Mapping[str, int]) -> Sample:
    """Return descriptors, threads and resident MiB of each process."""
    found: Sample = {}
    for name, pid in pids.items():
        process = psutil.Process(pid)
        size = resident_bytes(pid) / _MIB
        found[name] = {"fds": process.num_fds(), "threads": process.num_threads(), "mib": size}
    return found


def growth(before: Sample, after: Sample) -> list[str]:
    """Return what has grown more than it may, in words."""
    found = []
    for name, was in before.items():
        now = after[name]
        found += [
            f"{name}: {kind} {was[kind]:.0f} -> {now[kind]:.0f}"
            for kind in ("fds", "threads")
            if now[kind] > was[kind] + SLACK
        ]
        if now["mib"] > was["mib"] * GROWTH:
            found.append(f"{name}: {was['mib']:.0f} -> {now['mib']:.0f} MiB")
    return found


class Soak:
    """Clients that ask one thing after the other until so many requests have ended."""

    def __init__(self, url: str, total: int) -> None:
        place = urlsplit(url)
        self._host, self._port = place.hostname or "", place.port or 80
        self._total = total
        self._begun = 0
        self.ends: Counter[str] = Counter()

    async def run_until(self, number: int) -> None:
        """Return when so many requests have been made in all."""
        await asyncio.gather(*(self._client(number) for _ in range(_CLIENTS)))

    async def _client(self, number: int) -> None:
        reader: asyncio.StreamReader | None = None
        writer: asyncio.StreamWriter | None = None
        while self._begun < min(number, self._total):
            self._begun += 1
            mine = self._begun
            try:
                if reader is None or writer is None:
                    reader, writer = await asyncio.open_connection(self._host, self._port)
                async with asyncio.timeout(60):
                    end, kept = await self._ask(reader, writer, mine)
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                end, kept = type(error).__name__, False
            self.ends[end] += 1
            if not kept and writer is not None:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
                reader = writer = None
        if writer is not None:
            writer.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, mine: int) -> tuple[str, bool]:
        """Return how a request ended, and whether its connection can be used again."""
        leaves, nonsense = mine % _LEAVES_EVERY == 0, mine % _NONSENSE_EVERY == 0
        body: dict[str, Any] = {"model": _MODEL, "stream": True, "max_tokens": 10_000 if leaves else 4}
        body["messages"] = "nonsense" if nonsense else [{"role": "user", "content": f"number {mine}"}]
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
        writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(data) + data)
        answer = await reader.readuntil(b"\r\n\r\n")
        status = answer.split(b" ", 2)[1].decode()
        if nonsense:
            length = int(answer.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            await reader.readexactly(length)
            return f"{status} to nonsense", True
        if status != "200":
            return status, False
        if leaves:
            await reader.readuntil(b"data: ")
            return "left", False
        text = await reader.readuntil(b"\r\n0\r\n\r\n")
        return ("whole" if b"data: [DONE]" in text else "cut off"), True


async def soak(alone: Alone, total: int) -> tuple[Counter[str], list[Sample]]:
    """Run all requests in ten parts; return how they ended, and a look after each part."""
    run, looks = Soak(alone.url, total), []
    pids = alone.host.pids()
    for part in range(1, _PARTS + 1):
        began = time.monotonic()
        await run.run_until(total * part // _PARTS)
        pace = total / _PARTS / (time.monotonic() - began)
        await asyncio.sleep(_SETTLE_S)
        now = alone.host.pids()
        run.ends.update(f"{name} ended and was replaced" for name, pid in now.items() if pid != pids[name])
        pids = now
        looks.append(look(pids))
        words = ", ".join(f"{name} {kinds['mib']:.0f} MiB {kinds['fds']:.0f} fds" for name, kinds in looks[-1].items())
        print(f"{total * part // _PARTS} requests, {pace:.0f}/s: {words}", file=sys.stderr, flush=True)
    return run.ends, looks


def main() -> int:
    """Run it; the exit code is 1 if something grew or a request had no end of its own."""
    parser = argparse.ArgumentParser(prog="bench.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=at_least_one, default=100_000)
    args = parser.parse_args()
    if args.requests < _PARTS:
        parser.error(f"--requests: {args.requests} cannot be made in {_PARTS} parts")
    end_cleanly()
    with tempfile.TemporaryDirectory(prefix="lmx-soak-", dir="/tmp") as work:
        alone = Alone(Path(work))
        try:
            ends, looks = uvloop.run(soak(alone, args.requests))
        finally:
            alone.host.close()
    print("| after | process | descriptors | threads | MiB |\n|---|---|---|---|---|")
    for when, sample in (("a tenth", looks[0]), ("the end", looks[-1])):
        for name, kinds in sample.items():
            print(f"| {when} | {name} | {kinds['fds']:.0f} | {kinds['threads']:.0f} | {kinds['mib']:.1f} |")
    print("\nRequests: " + ", ".join(f"{count} {end}" for end, count in ends.most_common()))
    grown = growth(looks[0], looks[-1])
    for words in grown:
        print(f"grew: {words}")
    bad = set(ends) - {"whole", "left", "400 to nonsense"}
    return 1 if grown or bad else 0


if __name__ == "__main__":
    sys.exit(main())
