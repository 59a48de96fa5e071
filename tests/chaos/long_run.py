"""Long runs with faults: `python -m tests.chaos.long_run kills --minutes 10` and `… nemesis --minutes 30`.

Real MLX workers, real clients, real signals; every answer is compared with the uninterrupted one, the checker judges
the history, and descriptors, threads and memory of gateway and supervisor are compared with the start.
"""

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.chaos.figures import record
from tests.chaos.history import Outcome, Reference, Verdict, check, ended_by_two_deaths
from tests.harness import Lmx, read_stream
from tests.modelkit import make_tiny_model

MODELS = ("alpha", "beta")
PROMPTS = 24
LIMIT_S = 90.0
#: Descriptors, threads and memory at the end, of those at the start.
GROWTH = 1.05
#: Many kills in a row are the point here, so they are no crash loop, three supervisors a minute no safe mode, and no
#: request is to blame: each of the few prompts meets many kills.
SETTINGS = {
    "LMX_LIFECYCLE__BURST_FAILURES": "100000",
    "LMX_LIFECYCLE__SLOW_FAILURES": "100000",
    "LMX_LIFECYCLE__UNREADY_FAILURES": "100000",
    "LMX_LIFECYCLE__DEGRADED_FROM_TRY": "100000",
    "LMX_LIFECYCLE__BREAKER_FAILURES": "100000",
    "LMX_LIFECYCLE__SAFE_MODE_STARTS": "100000",
    "LMX_LIFECYCLE__RESTART_DELAYS_S": "[0.0]",
    "LMX_LIFECYCLE__HEARTBEAT_LATE_S": "2",
    "LMX_LIFECYCLE__HEARTBEAT_HUNG_S": "5",
    "LMX_GATEWAY__KEEPALIVE_S": "1",
    "LMX_GATEWAY__QUARANTINE_AFTER": "100000",
    "LMX_WORKER__SPARE": "true",
}


@dataclass
class Run:
    """One run: the server, the clients' history, and what was done to it."""

    lmx: Lmx
    references: dict[str, Reference]
    outcomes: list[Outcome] = field(default_factory=list)
    gateway_deaths: list[float] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    #: When which model's process was killed, and the gateway's memory then, in MB.
    killed: list[tuple[float, str]] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    #: Requests that met two deaths and ended with the typed error.
    twice: int = 0
    stop: asyncio.Event = field(default_factory=asyncio.Event)


def request(model: str, prompt: str, *, stream: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 20 + (hash_of(prompt) % 300),
        "stream": stream,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    return body


def hash_of(text: str) -> int:
    return sum((index + 1) * ord(letter) for index, letter in enumerate(text))


async def ask(http: httpx.AsyncClient, model: str, prompt: str, *, stream: bool, leave_after: int = 0) -> Outcome:
    """Send one request and write down how it went."""
    outcome = Outcome(model, prompt, stream, time.time())
    body = request(model, prompt, stream=stream)
    if stream:
        await _ask_stream(http, body, outcome, leave_after)
    else:
        try:
            answer = await http.post("/v1/chat/completions", json=body)
            outcome.status = answer.status_code
            document = answer.json()
            outcome.error = document.get("error")
            if outcome.error is None:
                outcome.text = document["choices"][0]["message"]["content"]
                outcome.finish = document["choices"][0]["finish_reason"]
                outcome.completion_tokens = document["usage"]["completion_tokens"]
        except httpx.HTTPError as error:
            outcome.cut = type(error).__name__
    outcome.ended_at = time.time()
    return outcome


class _LeaveError(Exception):
    """The client goes away on purpose."""


async def _ask_stream(http: httpx.AsyncClient, body: dict[str, Any], outcome: Outcome, leave_after: int) -> None:
    def note(stream: Any) -> None:
        if leave_after and len(stream.chunks) >= leave_after:
            outcome.text = stream.text
            raise _LeaveError

    try:
        seen = await read_stream(http, body, note)
    except _LeaveError:
        outcome.left, outcome.status = True, 200
        return
    outcome.status, outcome.text, outcome.finish, outcome.error = seen.status, seen.text, seen.finish, seen.error
    outcome.cut = seen.broken
    outcome.ends = int(seen.done) + int(seen.error is not None and seen.status == 200)
    usages = [chunk["usage"]["completion_tokens"] for chunk in seen.chunks if chunk.get("usage")]
    outcome.completion_tokens = usages[-1] if usages else None


async def bot(run: Run, model: str, number: int, *, leaves: bool) -> None:
    """One client: asks again and again, streaming and not, now and then leaving early."""
    rng = random.Random(number)
    prompts = sorted(run.references)
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=run.lmx.url, timeout=LIMIT_S, limits=limits) as http:
        while not run.stop.is_set():
            leave = rng.randint(2, 30) if leaves and rng.random() < 0.1 else 0
            outcome = await ask(
                http, model, rng.choice(prompts), stream=bool(leave) or rng.random() < 0.8, leave_after=leave
            )
            run.outcomes.append(outcome)
            if outcome.cut or outcome.error:
                await asyncio.sleep(0.2)


def kill_worker(run: Run, model: str, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.Error, StopIteration):
        pid = run.lmx.model(model)["pid"]
        if pid:
            psutil.Process(pid).send_signal(number)
            run.done.append(f"{number.name} {model}")
            run.killed.append((time.time(), model))


def kill_some_worker(run: Run, rng: random.Random) -> None:
    kill_worker(run, rng.choice(MODELS), rng.choice([signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV]))


async def kills(run: Run, minutes: float, every_s: float) -> None:
    """Kill one worker of one model every few seconds; the other model is never touched."""
    signals = (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV)
    end = time.monotonic() + 60 * minutes
    turn = 0
    while time.monotonic() < end:
        await asyncio.sleep(every_s)
        # Not while it is coming up again, which on a busy machine takes longer than the pause.
        await asyncio.to_thread(run.lmx.wait_model, "alpha")
        run.memory.append(resources(run.lmx)["gateway MB"])
        await asyncio.to_thread(kill_worker, run, "alpha", signals[turn % 3])
        turn += 1
        progress(f"{turn} kills, {len(run.outcomes)} requests")


async def nemesis(run: Run, minutes: float, every_s: float, seed: int) -> None:
    """Random faults in every role."""
    rng = random.Random(seed)
    faults: list[Callable[[Run, random.Random], None]] = [
        *[lambda r, g: kill_worker(r, g.choice(MODELS), g.choice([signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV]))]
        * 4,
        stop_and_continue,
        stop_for_good,
        kill_gateway,
        kill_supervisor,
    ]
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        await asyncio.sleep(rng.uniform(0.3, 2) * every_s)
        await asyncio.to_thread(rng.choice(faults), run, rng)
        progress(f"{len(run.done)} faults, {len(run.outcomes)} requests, last: {run.done[-1] if run.done else '-'}")


def worker(run: Run, rng: random.Random) -> psutil.Process:
    """Return some model's process; raise `psutil.NoSuchProcess` if it has none."""
    pid = run.lmx.model(rng.choice(MODELS))["pid"]
    if not pid:  # psutil would take None for ourselves
        raise psutil.NoSuchProcess(0)
    return psutil.Process(pid)


def stop_and_continue(run: Run, rng: random.Random) -> None:
    with contextlib.suppress(psutil.Error, StopIteration):
        process = worker(run, rng)
        process.suspend()
        time.sleep(rng.uniform(0.1, 2.0))
        process.resume()
        run.done.append("STOP/CONT")


def stop_for_good(run: Run, rng: random.Random) -> None:
    with contextlib.suppress(psutil.Error, StopIteration):
        worker(run, rng).suspend()
        run.done.append("STOP")


def kill_gateway(run: Run, _rng: random.Random) -> None:
    document = run.lmx.status()
    with contextlib.suppress(psutil.Error):
        if document and document["gateway"]["pid"]:
            run.gateway_deaths.append(time.time())
            psutil.Process(document["gateway"]["pid"]).kill()
            run.done.append("gateway KILL")


def kill_supervisor(run: Run, rng: random.Random) -> None:
    run.lmx.kill_supervisor()
    run.done.append("supervisor KILL")
    time.sleep(rng.uniform(0.0, 3.0))
    run.lmx.start()


def progress(words: str) -> None:
    sys.stderr.write(f"\r{words:<100}")
    sys.stderr.flush()


def _whole(document: dict[str, Any]) -> bool:
    """Whether every process is there: each is a connection and a watch of the supervisor's."""
    models = all(model["state"] == "ready" for model in document["models"])
    return models and document["gateway"]["state"] == document["spare"]["state"] == "ready"


def _every(pause_s: float, count: int, read: Callable[[], int]) -> list[int]:
    values = []
    for _ in range(count):
        values.append(read())
        time.sleep(pause_s)
    return values


def resources(lmx: Lmx) -> dict[str, float]:
    """Descriptors, threads and memory of the two processes that must not grow."""
    document = lmx.wait_status(_whole, within_s=60)
    found: dict[str, float] = {}
    for role in ("gateway", "supervisor"):
        process = psutil.Process(document[role]["pid"])
        # The question of a moment ago is a connection, too, which the supervisor closes when it comes to it.
        found[f"{role} fds"] = min(_every(0.1, 20, process.num_fds))
        found[f"{role} threads"] = min(_every(0.1, 20, process.num_threads))
        found[f"{role} MB"] = round(process.memory_info().rss / 1e6, 1)
    return found


async def learn(lmx: Lmx) -> dict[str, Reference]:
    """Ask every prompt once, undisturbed."""
    references = {}
    async with httpx.AsyncClient(base_url=lmx.url, timeout=LIMIT_S) as http:
        for number in range(PROMPTS):
            prompt = f"Story number {number}: " + "tell me more " * (number % 7)
            outcome = await ask(http, MODELS[0], prompt, stream=True)
            assert outcome.whole, outcome
            assert outcome.finish
            assert outcome.completion_tokens
            references[prompt] = Reference(outcome.text, outcome.finish, outcome.completion_tokens)
    return references


async def go(arguments: argparse.Namespace, lmx: Lmx) -> tuple[Verdict, Run, dict[str, float], dict[str, float]]:
    run = Run(lmx, await learn(lmx))
    leaves, count = arguments.what == "nemesis", arguments.clients

    def clients(first: int) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(bot(run, m, first + n, leaves=leaves)) for n in range(count) for m in MODELS]

    # The start is a server that has seen this load and two crashes: what a first time needs is no leak.
    warm = clients(0)
    for number in (signal.SIGKILL, signal.SIGABRT):
        await asyncio.sleep(arguments.warm_s / 2)
        await asyncio.to_thread(kill_worker, run, MODELS[0], number)
    await asyncio.sleep(arguments.warm_s / 2)
    run.stop.set()
    await asyncio.gather(*warm)
    run.stop.clear()
    run.done.clear()
    before = resources(lmx)
    bots = clients(100)
    if arguments.what == "kills":
        await kills(run, arguments.minutes, arguments.every)
    else:
        await nemesis(run, arguments.minutes, arguments.every, arguments.seed)
    run.stop.set()
    await asyncio.wait_for(asyncio.gather(*bots), LIMIT_S + 30)
    for model in MODELS:
        lmx.wait_model(model)
    twice = [outcome for outcome in run.outcomes if ended_by_two_deaths(outcome, run.killed)]
    once = [outcome for outcome in run.outcomes if outcome not in twice]
    run.twice = len(twice)
    verdict = check(once, run.references, limit_s=LIMIT_S, gateway_deaths=run.gateway_deaths)
    verdict.broken += check(twice, run.references, limit_s=LIMIT_S, gateway_deaths=run.gateway_deaths).broken
    return verdict, run, before, resources(lmx)


def main() -> int:
    """Run and judge; exit 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["kills", "nemesis"])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between faults")
    parser.add_argument("--clients", type=int, default=4, help="per model")
    parser.add_argument("--warm-s", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lmx-long-", dir="/tmp"))
    lmx = Lmx(**SETTINGS)
    try:
        lmx.start()
        model = make_tiny_model(folder / "tiny")
        for name in MODELS:
            lmx.load(model, name)
        verdict, run, before, after = asyncio.run(go(arguments, lmx))
        wrong = judge(arguments, verdict, run, before, after)
        if wrong:
            keep_evidence(lmx, arguments.what)
    finally:
        lmx.close()
        shutil.rmtree(folder, ignore_errors=True)
    report(arguments, verdict, run, before, after, wrong)
    return 1 if wrong else 0


def keep_evidence(lmx: Lmx, what: str) -> None:
    """Copy the journal and the logs to where they can be read after the run."""
    folder = Path(tempfile.mkdtemp(prefix=f"lmx-{what}-", dir="/tmp"))
    for name in ("logs", "state", "crashes"):
        shutil.copytree(lmx.home / name, folder / name, ignore_dangling_symlinks=True)
    sys.stderr.write(f"\njournal and logs are kept in {folder}\n")


def judge(
    arguments: argparse.Namespace, verdict: Verdict, run: Run, before: dict[str, float], after: dict[str, float]
) -> list[str]:
    """Return every broken promise in words."""
    wrong = list(verdict.broken)
    if not run.done or not run.outcomes:
        wrong.append("nothing happened")
    if arguments.what == "kills":
        # In the other run gateway and supervisor are replaced, and workers die faster than a request is worth.
        wrong += [f"{m}: {100 * verdict.share(m):.2f} % of requests" for m in MODELS if verdict.share(m) < 1.0]
        wrong += [f"{name}: {before[name]} -> {after[name]}" for name in after if after[name] > GROWTH * before[name]]
    return wrong


def report(
    arguments: argparse.Namespace,
    verdict: Verdict,
    run: Run,
    before: dict[str, float],
    after: dict[str, float],
    wrong: list[str],
) -> None:
    row = f"long run: {arguments.what}"
    for model in MODELS:
        target = 100.0 if arguments.what == "kills" else None
        share = 100 * verdict.share(model)
        record(
            row,
            f"{model}: whole and identical answers, of requests that met at most one death",
            share,
            target=target,
            unit="%",
            least=True,
        )
    record(row, "minutes", arguments.minutes, unit="")
    record(row, "broken promises", len(wrong), target=0, unit="")
    record(row, "faults", len(run.done), unit="")
    record(row, "requests", len(run.outcomes), unit="")
    record(row, "of them ended by a second death of their process", run.twice, unit="")
    for name, value in after.items():
        record(row, f"{name}, end over start", value / max(before[name], 1e-9), target=1.05, unit="x")
    print(
        json.dumps(
            {
                "faults": len(run.done),
                "requests": len(run.outcomes),
                "ended by a second death": run.twice,
                "counts": dict(verdict.counts),
                "wrong": wrong[:40],
                "gateway MB at each kill": run.memory,
                "before": before,
                "after": after,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
