"""What the door costs a request: the middleware in this process, with and without keys and limits.

.venv/bin/python -m bench.door

And what keys, limits and the record cost all streams together: two LMX with a tiny model, one without any of it and
one with all, asked in turns. .venv/bin/python -m bench.door --streams 16
"""

import argparse
import asyncio
import hmac
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

from bench.contenders import Lmx
from bench.options import at_least_one, end_cleanly
from bench.report import cpu_ms, tokens_per_s
from bench.workloads import Workload
from protocol.config import LimitsConfig
from supervisor.platform.blas import find_blas
from tests.modelkit import make_tiny_model
from tests.security.doorkit import PROXIES, DoorKit

ROUNDS, REQUESTS = 15, 400
BARE: Final = {"LMX_AUDIT__ENABLED": "false"}
#: Limits that are counted and never reached.
GUARDED: Final = {
    "LMX_SECURITY__PROFILE": "lan",
    "LMX_SECURITY__INFERENCE_KEYS": "required",
    "LMX_LIMITS__INFERENCE_PER_MINUTE": "1000000",
    "LMX_LIMITS__TOKENS_PER_MINUTE": "1000000000",
    "LMX_LIMITS__CONCURRENT_REQUESTS": "1000",
}
MANY = LimitsConfig(inference_per_minute=1_000_000, tokens_per_minute=1_000_000_000, concurrent_requests=1000)
SECRET: Final = b"a-secret-of-the-bench"
SECURITY: dict[str, Any] = {"profile": "lan", "trusted_proxies": PROXIES}


async def measure(kit: DoorKit, *, key: str, keys: int = 0, door: bool = True, signed: bool = False) -> float:
    """Return the microseconds of CPU time a request takes, in the best of the rounds."""
    for number in range(keys):
        kit.key(f"k{number}")
    scope_headers = [(b"host", b"127.0.0.1:1234"), (b"content-type", b"application/json"), (b"accept", b"*/*")]
    scope_headers += [(b"user-agent", b"OpenAI/Python"), (b"content-length", b"120")]
    scope_headers += [(b"authorization", f"Bearer {key}".encode())] if key else []
    body = b'{"model": "tiny", "max_tokens": 20, "messages": [{"role": "user", "content": "hello"}]}'

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(_message: Any) -> None:
        pass

    async def inner(_scope: Any, receive: Any, _send: Any) -> None:
        await receive()

    make: Any = kit.door.cls
    app: Any = make(inner, **kit.door.kwargs) if door else inner

    from gateway.context import RequestContext, attach
    from gateway.hosts import HostGuard

    if door:
        app = HostGuard(app, ("own",), frozenset())
    best = []
    for _ in range(ROUNDS):
        took = 0.0
        for _ in range(REQUESTS):
            headers = [*scope_headers, (b"x-lmx-client", _signed())] if signed else scope_headers
            scope: Any = {"type": "http", "method": "POST", "path": "/chat/completions", "headers": headers}
            scope |= {"client": ("192.0.2.7", 5), "state": {}}
            attach(scope, RequestContext("r", 0.0, None))
            began = time.thread_time()
            await app(scope, receive, send)
            took += time.thread_time() - began
        best.append(took / REQUESTS * 1e6)
    return min(best)


def _signed() -> bytes:
    text = f"anna;t={int(time.time())};n={secrets.token_urlsafe(12)}"
    return f"{text};s={hmac.new(SECRET, text.encode(), 'sha256').hexdigest()}".encode()


class Exact(Lmx):
    """With the gateway's CPU time by the scheduler's own clock (Linux): the usual one counts in steps of 10 ms."""

    def measure(self, workload: Workload) -> dict[str, Any]:
        """Measure as usual, but for that."""
        pid = self.pids()["gateway"]
        before = scheduled_s(pid)
        measured = super().measure(workload)
        if before:
            measured["cpu_s"]["gateway"] = scheduled_s(pid) - before
        return measured


class Bare(Exact):
    """Without keys, limits and audit."""

    name = "without"
    settings: Mapping[str, str] = BARE


class Control(Bare):
    """The same once more."""

    name = "without (control)"


class Guarded(Exact):
    """With all of it, and limits that are never reached."""

    name = "with"
    settings: Mapping[str, str] = GUARDED

    def _start(self) -> None:
        super()._start()
        self.key = self._host.command("keys", "create", "--name", "bench").strip()


def served(streams: int, rounds: int, tokens: int, requests: int) -> None:
    """Print the table of three systems, in turns; the first round warms up and does not count.

    The control is the same as the first: what is between these two is the machine's noise.
    """
    work = Path(tempfile.mkdtemp(prefix="lmx-bench-", dir="/tmp"))
    workload = Workload("door", streams, tokens, requests)
    results: dict[str, list[dict[str, Any]]] = {"without": [], "with": [], "without (control)": []}
    found: list[Lmx] = []
    try:
        folder, preload = make_tiny_model(work / "tiny"), find_blas(work)
        found = [Bare(folder, preload, 1), Guarded(folder, preload, 1), Control(folder, preload, 1)]
        for one in found:
            one.start()
        for number in range(rounds + 1):
            turn = number % len(found)
            for one in (found[turn:] + found[:turn])[:: 1 if number % 2 else -1]:
                measured = one.measure(workload)
                print(f"round {number}: {one.name} {tokens_per_s(measured):.0f} tok/s", file=sys.stderr)
                results[one.name] += [measured] if number else []
    finally:
        for one in found:
            one.close()
        shutil.rmtree(work, ignore_errors=True)
    print(f"{streams} streams, {tokens} tokens an answer, {requests} requests a stream, {rounds} rounds in turns.\n")
    print(
        "| keys, limits, audit | tok/s | its ratio | CPU of a token, its ratio | gateway: CPU ms/1,000 tokens | least |"
    )
    print("|---|---|---|---|---|---|")
    gateway = cpu_ms("gateway")
    least = {name: min(map(gateway, rows)) for name, rows in results.items()}
    for name, rows in results.items():
        pairs = list(zip(results["without"], rows, strict=True))
        cells = (
            _spread(map(tokens_per_s, rows), 0),
            _spread((tokens_per_s(b) / tokens_per_s(a) for a, b in pairs), 3),
            _spread((_cpu(b) / _cpu(a) for a, b in pairs), 3),
            _spread(map(gateway, rows), 1),
        )
        print(f"| {name} | {' | '.join(cells)} | {least[name]:.1f} |")
    # What disturbs can only add to CPU time: the least of many short rounds is nearest to what the work itself takes.
    whole = min(map(_cpu, (*results["without"], *results["without (control)"])))
    extra = least["with"] - min(least["without"], least["without (control)"])
    print(
        f"\nWorker and gateway take {whole:.0f} CPU ms per 1,000 tokens at the least; {extra / whole:.1%} is the door."
    )


def scheduled_s(pid: int) -> float:
    """Return the seconds that all threads of a process have run, 0 where the system does not say."""
    try:
        return sum(int(file.read_text().split()[0]) for file in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _spread(values: Iterable[float], digits: int) -> str:
    """Return the median and the quartiles: half of the rounds lie between them."""
    found = sorted(values)
    low, _, high = quantiles(found, n=4) if len(found) > 1 else (found[0], found[0], found[0])
    return f"{median(found):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _cpu(measured: dict[str, Any]) -> float:
    """Return the CPU time of a token: a machine shared with others changes it less than the time on the clock."""
    return cpu_ms("worker")(measured) + cpu_ms("gateway")(measured)


def audit_us(folder: Path) -> float:
    """Return the CPU microseconds that noting a request takes, in both threads, with 16 in each batch."""
    from gateway.audit import Audit
    from gateway.audit_store import AuditStore
    from gateway.auth import Access
    from gateway.context import RequestContext, Worked
    from protocol.config import AuditConfig

    store = AuditStore(folder / "audit.db", AuditConfig())
    audit = Audit(store)
    worked = Worked("tiny", stream=True, incarnation=1, ttft_ms=9.0, prompt_tokens=30, completion_tokens=128)
    best = []
    for number in range(ROUNDS * 4):
        began = time.process_time()
        for each in range(16):
            context = RequestContext(f"req_{number}_{each}", 0.0, None, access=Access("192.0.2.7"), worked=worked)
            audit.note({"method": "POST"}, context, route="/v1/chat/completions", status=200, took_s=0.1)
        store.write_now()
        best.append((time.process_time() - began) / 16 * 1e6)
    return median(best)


async def main() -> None:
    """Print the table."""
    rows = []
    for name, limits, security, with_key, keys in (
        ("no door", LimitsConfig(), {}, False, 0),
        ("local, no key, no limits", LimitsConfig(), {}, False, 0),
        ("lan, no key, limit on requests", LimitsConfig(inference_per_minute=1_000_000), SECURITY, False, 0),
        ("a key of 1,000, no limits", LimitsConfig(0, 0), SECURITY, True, 1000),
        ("a key, all limits", MANY, SECURITY, True, 10),
    ):
        kit = DoorKit(Path(tempfile.mkdtemp()), limits, **security)
        key = kit.key() if with_key else ""
        rows.append((name, await measure(kit, key=key, keys=keys, door=name != "no door")))
    folder = Path(tempfile.mkdtemp())
    (folder / "secret").write_bytes(SECRET)
    (folder / "secret").chmod(0o600)
    kit = DoorKit(folder, MANY, **SECURITY, client_secret_file=str(folder / "secret"))
    rows.append(("a key, all limits, a signed client id", await measure(kit, key=kit.key(), signed=True)))
    rows.append(("and noting it in the audit, in a batch of 16", audit_us(Path(tempfile.mkdtemp()))))
    print("| | µs a request |\n|---|---|")
    for name, took in rows:
        print(f"| {name} | {took:.1f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--streams", type=at_least_one, default=0, help="compare two whole systems with so many streams"
    )
    parser.add_argument("--rounds", type=at_least_one, default=8, help="alternating rounds (default: 8)")
    parser.add_argument("--tokens", type=at_least_one, default=128, help="tokens of each answer (default: 128)")
    parser.add_argument("--requests", type=at_least_one, default=4, help="requests of a stream in a round (default: 4)")
    args = parser.parse_args()
    end_cleanly()
    if args.streams:
        served(args.streams, args.rounds, args.tokens, args.requests)
    else:
        asyncio.run(main())
