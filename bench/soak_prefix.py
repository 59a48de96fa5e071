"""A long day in short: mixed lengths, clients that leave, prefixes that come and go, and nothing that grows.

`python -m bench.soak_prefix --minutes 20`: a real LMX whose prefix cache is far too small for what is asked. Clients
hold conversations of several turns, ask long and short questions, with one or several choices, streamed or not, and one
in eight of them leaves in the middle. Footprints of worker, gateway and supervisor are sampled, and descriptors and
threads of the first two; after the warm-up a line is laid through the footprints, against the number of requests. The
report goes to stdout, progress to stderr; exit code 1 when a bound did not hold.
"""

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import psutil

from bench.measures import slope
from bench.options import at_least_one, end_cleanly
from supervisor.platform import current_platform
from tests.harness import Lmx
from tests.modelkit import WORDS, make_tiny_model

MODEL: Final = "soak"
#: What is allowed of the footprint, in percent per 1,000 requests.
SLOPE: Final = 1.0
RAM_BYTES: Final = 24 * 1024 * 1024
DISK_BYTES: Final = 96 * 1024 * 1024
_SAMPLE_S: Final = 2.0
_WARM_UP: Final = 0.3
#: A line through fewer says nothing: allocators go up and down, and SQLite's cache in the gateway is still filling.
_LEAST: Final = 3000
_LEAVES: Final = 8
_SYSTEMS: Final = 40
#: Descriptors and threads may come and go with connections, but not add up.
_LOOSE: Final = 12
SETTINGS: Final = {
    "LMX_PREFIX__RAM_BYTES": str(RAM_BYTES),
    "LMX_PREFIX__DISK_BYTES": str(DISK_BYTES),
    "LMX_MEMORY__CLEAR_EVERY_S": "30",
    "LMX_MODELS__QUEUE_DEPTH": "8",
    "LMX_MODELS__MAX_CONCURRENT_REQUESTS": "8",
}


class _LeaveError(Exception):
    """The client goes away on purpose."""


@dataclass
class Sample:
    """What was seen at one moment; `requests` had ended by then."""

    at: float
    requests: int
    footprints: dict[str, int]
    handles: dict[str, int]


@dataclass
class Soak:
    """What happened so far."""

    stop_at: float
    done: int = 0
    left: int = 0
    refused: int = 0
    cached_tokens: int = 0
    prompt_tokens: int = 0
    broken: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


# -- clients --------------------------------------------------------------------------------------------------------


def words(chooser: random.Random, count: int) -> str:
    """Return some words."""
    return " ".join(chooser.choice(WORDS) for _ in range(count))


async def client(http: httpx.AsyncClient, soak: Soak, number: int) -> None:
    """Hold one conversation after another."""
    chooser = random.Random(number)
    while time.monotonic() < soak.stop_at:
        # Some system prompts are everybody's, most questions nobody else's.
        system = words(random.Random(f"system {chooser.randrange(_SYSTEMS)}"), 150)
        messages = [{"role": "system", "content": system}]
        for _ in range(chooser.randrange(1, 5)):
            messages.append({"role": "user", "content": words(chooser, chooser.choice((3, 20, 100, 400)))})
            answer = await request(http, soak, messages, chooser)
            if answer is None or time.monotonic() >= soak.stop_at:
                break
            messages.append({"role": "assistant", "content": answer})


async def request(
    http: httpx.AsyncClient, soak: Soak, messages: list[dict[str, str]], chooser: random.Random
) -> str | None:
    """Ask once; return the answer, None if there is none to go on with."""
    stream = chooser.random() < 0.7
    leaves = chooser.randrange(_LEAVES) == 0
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": messages,
        "max_tokens": chooser.choice((1, 8, 40, 150)),
        "temperature": chooser.choice((0, 0, 0.8)),
        "stream": stream,
    }
    if chooser.randrange(10) == 0:
        body["n"] = 2
    if stream:
        body["stream_options"] = {"include_usage": True}
    try:
        if stream:
            text, usage = await _streamed(http, body, chooser.randrange(1, 12) if leaves else 0)
        else:
            text, usage = await _whole(http, body, chooser.uniform(0.001, 0.2) if leaves else None)
    except _LeaveError:
        soak.left += 1
        return None
    except httpx.HTTPStatusError as error:
        if error.response.status_code not in {429, 503}:
            soak.broken.append(f"status {error.response.status_code}")
        soak.refused += 1
        await asyncio.sleep(0.2)
        return None
    except (httpx.HTTPError, KeyError, json.JSONDecodeError) as error:
        soak.broken.append(type(error).__name__)
        return None
    finally:
        soak.done += 1
    soak.prompt_tokens += usage["prompt_tokens"]
    soak.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
    return text


async def _whole(http: httpx.AsyncClient, body: dict[str, Any], patience_s: float | None) -> tuple[str, dict[str, Any]]:
    try:
        async with asyncio.timeout(patience_s):
            response = await http.post("/v1/chat/completions", json=body)
    except TimeoutError:
        raise _LeaveError from None
    response.raise_for_status()
    document = response.json()
    return document["choices"][0]["message"]["content"], document["usage"]


async def _streamed(http: httpx.AsyncClient, body: dict[str, Any], leave_after: int) -> tuple[str, dict[str, Any]]:
    text, usage, chunks, done = "", dict[str, Any](), 0, False
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data:"):
                chunk = json.loads(line.removeprefix("data:"))
                chunks += 1
                text += "".join(c["delta"].get("content") or "" for c in chunk["choices"] if c["index"] == 0)
                usage = chunk.get("usage") or usage
                if leave_after and chunks >= leave_after:
                    raise _LeaveError
    if not done:
        raise KeyError("[DONE]")
    return text, usage


# -- samples --------------------------------------------------------------------------------------------------------


async def watch(lmx: Lmx, soak: Soak, incarnation: int) -> None:
    """Sample until the end; what must never be is noted as broken."""
    said_at, platform = time.monotonic(), current_platform()
    while time.monotonic() < soak.stop_at:
        await asyncio.sleep(_SAMPLE_S)
        document = await asyncio.to_thread(lmx.status)
        if document is None:
            continue
        model = next(entry for entry in document["models"] if entry["id"] == MODEL)
        pids = {"worker": model["pid"], "gateway": document["gateway"]["pid"]}
        handles: dict[str, int] = {}
        with contextlib.suppress(psutil.Error):
            for name, pid in pids.items():
                process = psutil.Process(pid)
                handles[f"{name} descriptors"] = process.num_fds()
                handles[f"{name} threads"] = process.num_threads()
        memory, gateway = model["memory_bytes"], document["gateway"]["memory_bytes"]
        supervisor = None if lmx.process is None else platform.footprint(lmx.process.pid)
        if memory is None or gateway is None or supervisor is None or len(handles) < len(pids) * 2:
            continue
        footprints = {"worker": memory, "gateway": gateway, "supervisor": supervisor}
        soak.samples.append(Sample(time.monotonic(), soak.done, footprints, handles))
        if model["incarnation"] != incarnation:
            soak.broken.append("the worker was replaced")
            return
        if model["limit_bytes"] and memory > model["limit_bytes"]:
            soak.broken.append(f"worker at {memory} of {model['limit_bytes']} bytes")
        on_disk = sum(size_of(file) for file in (lmx.home / "cache").glob("*/*/*"))
        if on_disk > DISK_BYTES:
            soak.broken.append(f"{on_disk} bytes of prefixes on disk")
        if time.monotonic() - said_at > 30:
            said_at = time.monotonic()
            left = soak.stop_at - said_at
            print(f"{soak.done} requests, worker {memory / 2**20:.0f} MiB, {left:.0f} s left", file=sys.stderr)


def size_of(file: Path) -> int:
    """Return the bytes of a file, 0 if it went meanwhile."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def events(lmx: Lmx, name: str) -> list[dict[str, Any]]:
    """Return what the worker logged of one kind."""
    found = []
    for file in (lmx.home / "logs").glob(f"{MODEL}-*.log"):
        found += [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in found if line["event"] == name]


# -- the verdict ----------------------------------------------------------------------------------------------------


def report(lmx: Lmx, soak: Soak) -> tuple[str, list[str]]:
    """Return the table, and what did not hold."""
    wrong = [f"{soak.broken.count(what)} x {what}" for what in sorted(set(soak.broken))]
    measured = soak.samples[int(len(soak.samples) * _WARM_UP) :]
    if len(measured) < 3:
        return "", [*wrong, "too few samples"]
    lines = ["| | first | last | highest | % per 1,000 requests |", "|---|---|---|---|---|"]
    requests = measured[-1].requests - measured[0].requests
    if requests < _LEAST:
        wrong.append(f"{requests} requests after the warm-up are too few to say what grows: it takes {_LEAST}")
    for name in measured[0].footprints:
        values = [sample.footprints[name] for sample in measured]
        growth = slope([(sample.requests, value) for sample, value in zip(measured, values, strict=True)])
        cells = [f"{value / 2**20:.1f} MiB" for value in (values[0], values[-1], max(values))]
        lines.append(f"| {name} footprint | {' | '.join(cells)} | {growth:+.2f} |")
        if growth > SLOPE:
            wrong.append(f"the footprint of the {name} grows by {growth:.2f} % per 1,000 requests")
    for name in measured[0].handles:
        values = [sample.handles[name] for sample in measured]
        lines.append(f"| {name} | {values[0]} | {values[-1]} | {max(values)} | |")
        if values[-1] > values[0] + _LOOSE:
            wrong.append(f"{name} grew from {values[0]} to {values[-1]}")
    kept = events(lmx, "prefix_cache")
    if any(line["bytes"] > RAM_BYTES or line["bytes"] > line["limit_bytes"] for line in kept):
        wrong.append("the prefix cache was above its limit")
    if any(line["rejected"] for line in kept):
        wrong.append("prefixes were rejected")
    if kept:
        last = kept[-1]
        lines.append(f"| prefixes in memory | | {last['bytes'] / 2**20:.1f} MiB | of {RAM_BYTES / 2**20:.0f} MiB | |")
    share = 100 * soak.cached_tokens / max(1, soak.prompt_tokens)
    words = (
        f"{soak.done} requests, {requests} of them after the warm-up; {soak.left} "
        f"left early, {soak.refused} were refused (429, 503); {share:.0f} % of the prompt tokens came from the cache."
    )
    return "\n".join([*lines, "", words]), wrong


async def run(lmx: Lmx, minutes: float, clients: int) -> Soak:
    """Let clients loose for so many minutes."""
    soak = Soak(time.monotonic() + minutes * 60)
    limits = httpx.Limits(max_connections=clients * 2, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=lmx.url, timeout=300, limits=limits) as http:
        incarnation = int(lmx.model(MODEL)["incarnation"])
        await asyncio.gather(watch(lmx, soak, incarnation), *[client(http, soak, number) for number in range(clients)])
    return soak


def main() -> int:
    parser = argparse.ArgumentParser(description="Mixed load for a while; what grows, and whether bounds held.")
    parser.add_argument("--minutes", type=float, default=20.0, help="default: 20")
    parser.add_argument("--clients", type=at_least_one, default=12, help="default: 12")
    parser.add_argument("--model", type=Path, help="an MLX model folder (default: a tiny random model)")
    parser.add_argument("--without", action="store_true", help="without the prefix cache, to compare")
    args = parser.parse_args()
    end_cleanly()
    work = Path(tempfile.mkdtemp(prefix="lmx-soak-", dir="/tmp"))
    lmx = Lmx(**SETTINGS, LMX_PREFIX__ENABLED="false" if args.without else "true")
    try:
        lmx.start()
        lmx.load(args.model or make_tiny_model(work / "tiny"), MODEL)
        soak = asyncio.run(run(lmx, args.minutes, args.clients))
        table, wrong = report(lmx, soak)
    finally:
        lmx.close()
        shutil.rmtree(work, ignore_errors=True)
    print(table)
    for what in wrong:
        print(f"DID NOT HOLD: {what}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
