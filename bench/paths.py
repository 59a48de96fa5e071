"""What our own code costs for an event and for a short request, without processes: `python -m bench.paths FILE`.

The real gateway between a transport and a link that only count, the real book of a worker between made-up commands and
replies, and the real batch beside mlx-lm's. Slices of a millisecond take turns with slices of something fixed, and the
median of the ratios of their CPU times counts: two neighbours have the same machine, whatever that is at the moment. A
wait that should not be shows in the time on the clock, told when it is always more than twice the CPU time. How many
functions are called is counted too: that is the same on every machine.
"""

import argparse
import asyncio
import gc
import itertools
import selectors
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any, Final
from unittest.mock import patch

import msgspec

from bench.load import make_request
from bench.options import at_least_one, end_cleanly
from bench.workloads import Workload, prompt
from gateway.app import Parts, build_app
from gateway.audit import Audit
from gateway.catalog import CatalogView
from gateway.link import LinkOwner
from gateway.numbers import Numbers
from gateway.pool import WorkerPool
from gateway.server import HttpProtocol, Server
from gateway.traffic import Traffic
from gateway.vitals import VitalsView
from protocol.config import GatewayConfig, LifecycleConfig, SecurityConfig
from protocol.control import Catalog, CatalogModel
from protocol.data import Accepted, Delta, Finish, Kind, Sampling, Step, Submit, Usage, to_worker_decoder
from protocol.logs import setup_logging
from protocol.messages import encode
from protocol.spec import GatewaySpec
from protocol.states import ModelState
from worker.detok import AnswerText, StopStrings, TokenText
from worker.entry import Limits
from worker.jobs import AT_LENGTH, GOES_ON, Prepared, Stepped
from worker.requests import Book

_MODEL: Final = "null"
_STREAMS: Final = 64
_ROWS: Final = 32
#: Of a slice, so that all take about a millisecond or less.
_STEPS: Final = 2
_BOOK_STEPS: Final = 8
_BOOK_REQUESTS: Final = 4
_MAX_TURNS: Final = 1000
#: Timers of streams come in between.
_COUNTS: Final = 25
Figures = dict[str, float]
Slice = Callable[[], Awaitable[None]]


def unit() -> None:
    """Do a fixed piece of Python of the kind that a gateway does: what a slice is measured by, about a millisecond."""
    kept: dict[int, bytes] = {}
    for number in range(2_000):
        kept[number % 512] = b"data: %b\n\n" % msgspec.json.encode({"n": number, "text": f"word {number}"})
    if len(kept) != 512:
        raise AssertionError


class _NoSelector(selectors.SelectSelector):
    """Finds nothing to read, without asking the system: what that takes tells who else uses the machine."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:  # noqa: ARG002
        return []


class _Transport:
    """Counts writes; is never full."""

    def __init__(self) -> None:
        self.writes = 0
        self.last = b""

    def write(self, data: bytes) -> None:
        self.writes += 1
        self.last = data

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 1) if name in {"peername", "sockname"} else None

    def pause_reading(self) -> None:
        """Nothing is read."""

    resume_reading = close = abort = pause_reading


class _Link:
    """The far end of a worker's link: keeps what is asked, says what it is told to say."""

    closed = False

    def __init__(self, owner: LinkOwner) -> None:
        self.owner = owner
        self.asked: list[Submit] = []
        self._decode = to_worker_decoder().decode

    def send(self, body: bytes) -> bool:
        message = self._decode(body)
        if isinstance(message, Submit):
            self.asked.append(message)
        return True

    def say(self, *messages: Any) -> None:
        for message in messages:
            self.owner.on_frame(encode(message))

    def close(self) -> None:
        self.closed = True


class _Plane:
    """Makes one link."""

    def __init__(self) -> None:
        self.links: list[_Link] = []

    def connect(self, _endpoint: str, owner: LinkOwner) -> _Link:
        self.links.append(_Link(owner))
        asyncio.get_running_loop().call_soon(owner.on_connected)
        return self.links[-1]

    def close(self) -> None:
        """Nothing is open."""


class GatewayPath:
    """A gateway without sockets and processes, with streams that never end."""

    def __init__(self) -> None:
        config = GatewayConfig()
        catalog, numbers, traffic, plane = CatalogView(), Numbers(), Traffic(), _Plane()
        with patch("gateway.pool.DataPlane", lambda: plane):
            pool = WorkerPool(config, catalog, lambda _: None, numbers)
        spec = GatewaySpec(1, 0, "", "", "INFO", config, LifecycleConfig())
        scene: Any = lambda: None  # noqa: E731 - nobody asks for metrics
        app = build_app(spec, Parts(catalog, pool, traffic, numbers, VitalsView(), scene, Audit(None)))
        self._server = Server(app, lambda: None, SecurityConfig())
        self._server.config.load()
        found = Catalog(1, [CatalogModel(_MODEL, ModelState.READY, 0, 1, "nowhere")])
        catalog.replace(found)
        pool.apply(found)
        self._link = plane.links[0]
        self._numbers = itertools.count()
        self._streams: list[tuple[_Transport, int]] = []
        self._connection, self._transport = self._connect()

    async def begin(self) -> None:
        """Ask for the streams."""
        for stream in range(_STREAMS):
            protocol, transport = self._connect()
            rid = await self._ask(protocol, stream)
            self._streams.append((transport, rid))
        self._link.say(*(Accepted(1, rid, 5) for _, rid in self._streams))
        await _until(lambda: all(transport.writes for transport, _ in self._streams))

    async def events(self) -> None:
        """Bring some steps to all streams."""
        for _ in range(_STEPS):
            before = [transport.writes for transport, _ in self._streams]
            number = next(self._numbers)
            self._link.say(Step(1, number, [Delta(rid, f" word{number % 90}", [5]) for _, rid in self._streams]))
            await _until(lambda: all(t.writes > was for (t, _), was in zip(self._streams, before, strict=True)))  # noqa: B023

    async def requests(self) -> None:
        """Take a request with an answer of one token."""
        rid = await self._ask(self._connection, 0)
        self._link.say(Accepted(1, rid, 5))
        self._link.say(Step(1, 1, [Delta(rid, "word", [5], Finish.LENGTH, Usage(5, 1))]))
        await _until(lambda: self._transport.last.endswith(b"0\r\n\r\n"))

    def _connect(self) -> tuple[HttpProtocol, _Transport]:
        transport = _Transport()
        make: Any = self._server.config.http_protocol_class
        protocol: HttpProtocol = make(config=self._server.config, server_state=self._server.server_state, app_state={})
        protocol.connection_made(transport)  # type: ignore[arg-type]
        return protocol, transport

    async def _ask(self, protocol: HttpProtocol, number: int) -> int:
        workload = Workload("paths", 1, 8)
        protocol.transport.last = b""  # type: ignore[attr-defined]
        protocol.data_received(make_request("127.0.0.1", _MODEL, workload, prompt(workload, number, 0)))
        await _until(lambda: bool(self._link.asked))
        return self._link.asked.pop().rid


class WorkerPath:
    """The book of a worker with running requests that never end."""

    def __init__(self) -> None:
        self.bytes = 0
        self._commands: list[Any] = []
        self._book = Book(Limits(_ROWS + 1, 8, 60.0), 1, self._prepare, send=self._send, command=self._commands.append)
        self._rids = itertools.count(1)
        for _ in range(_ROWS):
            self._submit()
        self._rows = [command.id for command in self._commands]

    async def events(self) -> None:
        """Take some steps of all rows."""
        for step in range(_BOOK_STEPS):
            self._book.on_steps([Stepped(step, [(job, 65 + step, GOES_ON) for job in self._rows])], 1.0)

    async def requests(self) -> None:
        """Take some requests with an answer of one token, one after the other."""
        for _ in range(_BOOK_REQUESTS):
            self._commands.clear()
            self._submit()
            self._book.on_steps([Stepped(1, [(self._commands[0].id, 65, AT_LENGTH)])], 1.0)

    def _submit(self) -> None:
        self._book.submit(b"g", Submit(1, next(self._rids), Kind.CHAT, [], Sampling(), 60.0, trace="t"), 1.0)

    def _send(self, _gateway: bytes, message: Any) -> None:
        self.bytes += len(encode(message))

    def _prepare(self, _submit: Submit) -> Prepared:
        text = TokenText(lambda tokens: "".join(map(chr, tokens)), frozenset())
        return Prepared([1, 2, 3], 1_000_000_000, AnswerText(text, StopStrings(())))


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(_MAX_TURNS):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the gateway has done nothing")


async def measure(rounds: int) -> Figures:
    """Return microseconds for each, over the milliseconds of `unit`."""
    gateway, worker = GatewayPath(), WorkerPath()
    await gateway.begin()
    slices: dict[str, tuple[Slice, int]] = {
        "gateway: an event": (gateway.events, _STREAMS * _STEPS),
        "gateway: a short request": (gateway.requests, 1),
        "worker: a token of the book": (worker.events, _ROWS * _BOOK_STEPS),
        "worker: a short request of the book": (worker.requests, _BOOK_REQUESTS),
    }
    gc.collect()
    gc.freeze()
    try:
        return await _measure(slices, rounds)
    finally:
        gc.unfreeze()


async def _measure(slices: dict[str, tuple[Slice, int]], rounds: int) -> Figures:
    ratios: dict[str, list[float]] = {name: [] for name in slices}
    waits = dict.fromkeys(slices, float("inf"))
    for _ in range(rounds):
        for name, (run, count) in slices.items():
            unit_s, _ = await _timed(_unit)
            cpu_s, wall_s = await _timed(run)
            ratios[name].append(cpu_s / count / unit_s)
            waits[name] = min(waits[name], wall_s / cpu_s)
    figures = {f"{name}, 1/1000 of a unit": median(ratios[name]) * 1000 for name in slices}
    figures |= {f"{name}: time over CPU, if above 2": max(2.0, waits[name]) for name in slices}
    calls = {
        f"{name}: calls": min([await _count_calls(run) for _ in range(_COUNTS)]) / count
        for name, (run, count) in slices.items()
    }
    return figures | calls


async def _count_calls(run: Slice) -> float:
    """Return how many functions are called, in Python and in C."""
    calls = 0

    def note(_frame: Any, what: str, _argument: Any) -> None:
        nonlocal calls
        calls += what in {"call", "c_call"}

    sys.setprofile(note)
    try:
        await run()
    finally:
        sys.setprofile(None)
    return calls


async def _timed(run: Slice) -> tuple[float, float]:
    """Return the CPU seconds of this thread, and those on the clock."""
    began, began_cpu = time.perf_counter(), time.thread_time()
    await run()
    return time.thread_time() - began_cpu, time.perf_counter() - began


async def _unit() -> None:
    unit()


def measure_engine(folder: Path, rounds: int) -> Figures:
    """Return what 64 tokens of 16 rows cost in the batch of the worker, over the one of mlx-lm that it is made of."""
    from mlx_lm import load

    from bench.inprocess import Limit
    from worker.batch import BatchBackend
    from worker.jobs import Job

    rows, tokens = 16, 64
    loaded = load(str(folder))
    limit = Limit(str(folder), is_lean=True)
    backend = BatchBackend(loaded[0], loaded[1].eos_token_ids, slots=32, prefill_tokens=512)
    numbers = itertools.count(1)
    ratios: list[float] = []
    prompts = [loaded[1].encode(prompt(Workload("engine", rows, tokens), row, 0)) for row in range(rows)]
    for _ in range(rounds):
        for row in range(rows):
            backend.insert(Job(next(numbers), prompts[row], tokens))
        ours_s = _cpu_s(backend.step, lambda: bool(len(backend)))
        ratios.append(ours_s / _cpu_s(*limit.stepper(prompts, tokens)))
    return {"worker: CPU of a batch of 16 over in-process": median(ratios)}


def _cpu_s(step: Callable[[], Any], goes_on: Callable[[], bool]) -> float:
    """Return the CPU seconds of all threads until there is no step left to make."""
    began = time.process_time()
    while goes_on():
        step()
    return time.process_time() - began


def main() -> int:
    """Measure; write the figures as JSON."""
    parser = argparse.ArgumentParser(prog="bench.paths", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=at_least_one, default=400)
    parser.add_argument("--engine", type=Path, metavar="FOLDER", help="measure the batch with this model instead")
    args = parser.parse_args()
    end_cleanly()
    if args.engine:
        figures = measure_engine(args.engine, args.rounds)
    else:
        with tempfile.TemporaryDirectory(prefix="lmx-paths-", dir="/tmp") as folder:
            setup_logging("bench", file=Path(folder) / "log", terminal=False, level="WARNING")
            with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(_NoSelector())) as runner:
                figures = runner.run(measure(args.rounds))
    sys.stdout.write(msgspec.json.encode(figures).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
