"""A real gateway process between a supervisor and workers that live in the test: they speak the real protocol."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import zmq
import zmq.asyncio

from bench.host import json_lines
from protocol import PROTOCOL_VERSION
from protocol.channel import Channel, ChannelClosedError
from protocol.config import GatewayConfig, LifecycleConfig
from protocol.control import (
    MAX_FRAME_BYTES,
    Capabilities,
    Catalog,
    CatalogModel,
    GatewayHeartbeat,
    GatewayHello,
    GatewayReady,
    Ping,
    Welcome,
    to_supervisor_decoder,
)
from protocol.data import Abort, Accepted, Delta, Finish, Step, Submit, Usage, to_worker_decoder
from protocol.messages import Message, encode
from protocol.spec import GatewaySpec, write_spec
from protocol.states import ModelState

ROOT = Path(__file__).parents[2]
#: Nothing here takes a second; a machine that is busy may.
PATIENCE_S = 20.0
#: Whatever happens to a model, its requests are told at once.
FAIL = GatewayConfig(on_crash="fail", hold_while_loading_s=0, hold_while_restarting_s=0)
MessageT = TypeVar("MessageT")


class FakeSupervisor:
    """Accepts gateways on a unix socket and keeps what they say."""

    def __init__(self, path: Path, lease_s: float) -> None:
        self._path = path
        self._lease_s = lease_s
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.setblocking(False)
        self._listener.bind(str(path))
        self._listener.listen()
        self._decoder = to_supervisor_decoder()
        self._version = 0
        self.models: list[CatalogModel] = []
        #: What each ping says of everything, as JSON.
        self.status = b""
        self.channel: Channel | None = None
        self.said: asyncio.Queue[Message] = asyncio.Queue()
        self.listen_fd: int | None = None
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(self._listener)
            self.channel = Channel(sock, limit=MAX_FRAME_BYTES)
            try:
                while True:
                    message = self._decoder.decode(await self.channel.receive())
                    if isinstance(message, GatewayHello):
                        self.listen_fd = self.channel.take_fd()
                        self.send(Welcome(PROTOCOL_VERSION, self._lease_s))
                        self.publish()
                    elif isinstance(message, GatewayHeartbeat):
                        self.send(Ping(self.status))
                    await self.said.put(message)
            except ChannelClosedError:
                self.channel = None

    async def hear(self, kind: type[MessageT]) -> MessageT:
        """Return the next message of this kind; others are skipped."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                message = await self.said.get()
                if isinstance(message, kind):
                    return message

    def send(self, message: Message) -> None:
        if self.channel is not None and not self.channel.closed:
            self.channel.send(encode(message))

    def publish(self, *models: CatalogModel) -> None:
        """Send the catalog, with these models in place of those of the same id."""
        names = {model.id for model in models}
        self.models = [*(m for m in self.models if m.id not in names), *models]
        self._version += 1
        self.send(Catalog(self._version, self.models))

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self.channel is not None:
            self.channel.close()
        self._listener.close()
        self._path.unlink()
        if self.listen_fd is not None:
            os.close(self.listen_fd)


class FakeWorker:
    """A ROUTER that speaks the data plane. The test says what it answers."""

    def __init__(self, home: Path, model: str, incarnation: int = 1) -> None:
        self.model = model
        self.incarnation = incarnation
        self.endpoint = str(home / f"w{abs(hash(model)) % 10**6}.{incarnation}.sock")
        self._context = zmq.asyncio.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.set(zmq.ROUTER_MANDATORY, 1)
        self.socket.set(zmq.LINGER, 0)
        self.socket.bind(f"ipc://{self.endpoint}")
        self._monitor = self.socket.get_monitor_socket(zmq.Event.HANDSHAKE_SUCCEEDED)
        self._decoder = to_worker_decoder()
        self._identity = b""

    def catalog_model(self, **changes: Any) -> CatalogModel:
        fields: dict[str, Any] = {
            "id": self.model,
            "state": ModelState.READY,
            "created_at": 1_700_000_000,
            "incarnation": self.incarnation,
            "endpoint": self.endpoint,
            "capabilities": Capabilities(2048, 1, ["chat"], 32),
        }
        return CatalogModel(**{**fields, **changes})

    async def met(self) -> None:
        """Wait until the gateway has a link to this incarnation."""
        async with asyncio.timeout(PATIENCE_S):
            await self._monitor.recv_multipart()

    async def receive(self, kind: type[MessageT]) -> MessageT:
        async with asyncio.timeout(PATIENCE_S):
            self._identity, frame = await self.socket.recv_multipart()
        message = self._decoder.decode(frame)
        assert isinstance(message, kind), message
        return message

    async def send(self, message: Message) -> None:
        await self.send_raw(encode(message))

    async def send_raw(self, *frames: bytes) -> None:
        await self.socket.send_multipart([self._identity, *frames])

    async def accept(self) -> Submit:
        """Take the next request."""
        submit = await self.receive(Submit)
        await self.send(Accepted(self.incarnation, submit.rid, prompt_tokens=7, cached_tokens=3))
        return submit

    async def step(self, rid: int, text: str, *, finish: Finish | None = None, tokens: int = 1) -> None:
        usage = None if finish is None else Usage(7, tokens, 3)
        await self.send(Step(self.incarnation, 1, [Delta(rid, text, [1], finish, usage)]))

    async def answer(self, *texts: str, finish: Finish = Finish.STOP) -> Submit:
        """Take the next request and answer it with these pieces."""
        submit = await self.accept()
        for text in texts[:-1]:
            await self.step(submit.rid, text)
        await self.step(submit.rid, texts[-1], finish=finish, tokens=len(texts))
        return submit

    async def aborted(self, rid: int) -> None:
        """Wait until the gateway takes back a request."""
        abort = await self.receive(Abort)
        assert abort.rids == [rid]
        assert abort.incarnation == self.incarnation

    def die(self) -> None:
        """Do what a killed process does: close the socket without a word."""
        self._context.destroy(linger=0)


class GatewayProcess:
    """`python -m gateway` on an ephemeral port."""

    def __init__(self, home: Path, config: GatewayConfig, lifecycle: LifecycleConfig, **door: Any) -> None:
        self.home = home
        self.log = home / "gateway.log"
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.spec = home / "gateway.json"
        fd = self.listener.fileno()
        write_spec(
            self.spec,
            GatewaySpec(1, fd, str(home / "s.sock"), str(self.log), "DEBUG", config, lifecycle, **door),
        )
        self.stderr = (home / "stderr").open("ab")
        self.spawn()

    def spawn(self) -> None:
        """Start a process on the listening socket; again, once it has ended."""
        self.started_at = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gateway", str(self.spec)],
            cwd=ROOT,
            pass_fds=[self.listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self.stderr,
            stderr=self.stderr,
            start_new_session=True,
        )

    def events(self) -> list[dict[str, Any]]:
        return json_lines(self.log)

    async def exit_code(self) -> int:
        await until(lambda: self.process.poll() is not None)
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        self.stderr.close()
        self.listener.close()


class Stack:
    """A gateway, its supervisor, its workers and a client of it."""

    def __init__(self, home: Path, config: GatewayConfig, lifecycle: LifecycleConfig, **door: Any) -> None:
        self.home = home
        self.supervisor = FakeSupervisor(home / "s.sock", lifecycle.lease_s)
        self.lifecycle = lifecycle
        self.gateway = GatewayProcess(home, config, lifecycle, **door)
        self.client = httpx.AsyncClient(
            base_url=self.gateway.url,
            timeout=PATIENCE_S,
            trust_env=False,
            # A broken stream closes its connection; a client that reuses it that moment has to try again.
            limits=httpx.Limits(max_keepalive_connections=0),
        )
        self.workers: list[FakeWorker] = []

    async def start_worker(self, model: str = "tiny", incarnation: int = 1) -> FakeWorker:
        """Bind a worker, publish it, and wait until the gateway routes to it."""
        worker = FakeWorker(self.home, model, incarnation)
        self.workers.append(worker)
        self.supervisor.publish(worker.catalog_model())
        await worker.met()  # the state alone may still be that of the incarnation before
        await self.state(model, ModelState.READY)
        return worker

    async def state(self, model: str, state: ModelState) -> None:
        """Wait until the gateway shows the model in this state."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                answer = await self.client.get(f"/v1/models/{model}")
                if answer.status_code == 200 and answer.json()["state"] == state.value:
                    return

    async def restart_supervisor(self) -> None:
        """End the supervisor and start the next one with what the last one knew."""
        models = self.supervisor.models
        await self.supervisor.close()
        self.supervisor = FakeSupervisor(self.home / "s.sock", self.lifecycle.lease_s)
        self.supervisor.models = models

    def chat(self, **fields: Any) -> asyncio.Task[httpx.Response]:
        """Send a chat request in the background."""
        return asyncio.create_task(self.client.post("/v1/chat/completions", json=chat_body(**fields)))

    async def close(self) -> None:
        await self.client.aclose()
        for worker in self.workers:
            worker.die()
        self.gateway.close()
        await self.supervisor.close()
        errors = (self.home / "stderr").read_bytes()
        shutil.rmtree(self.home)
        assert errors == b"", errors.decode()


@asynccontextmanager
async def stack(
    config: GatewayConfig | None = None, lifecycle: LifecycleConfig | None = None, **door: Any
) -> AsyncIterator[Stack]:
    """Yield a stack whose gateway is ready. `door`: the fields of `GatewaySpec` that say who comes in."""
    home = Path(tempfile.mkdtemp(prefix="lmx-", dir="/tmp"))
    made = Stack(home, config or GatewayConfig(), lifecycle or LifecycleConfig(), **door)
    try:
        await made.supervisor.hear(GatewayReady)
        yield made
    finally:
        await made.close()


def chat_body(**fields: Any) -> dict[str, Any]:
    """Return a chat request that is right but for `fields`."""
    return {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], **fields}


async def least(measure: Callable[[], Awaitable[float]], below: float, tries: int = 6) -> float:
    """Return the least of several measurements, in seconds: of the others the machine has its share. Stops `below`."""
    took: list[float] = []
    while len(took) < tries and min(took, default=below) >= below:
        took.append(await measure())
    return min(took)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is true that no event tells."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - the other process sends no event
            await asyncio.sleep(0.005)


def chunks(body: str) -> list[Any]:
    """Return what the `data:` lines of a stream hold, `[DONE]` as it is."""
    data = [line.removeprefix("data: ") for line in body.split("\n") if line.startswith("data: ")]
    return [item if item == "[DONE]" else msgspec.json.decode(item) for item in data]


def text_of(body: str) -> str:
    """Return the text that a stream carried."""
    parts = [c["choices"][0]["delta"].get("content", "") for c in chunks(body) if c != "[DONE]" and c.get("choices")]
    return "".join(parts)


def error_code(answer: httpx.Response) -> str:
    """Return the code of the error that ended a request, before or after its headers: which is a matter of time."""
    body = answer.json() if answer.is_error else chunks(answer.text)[-1]
    return str(body["error"]["code"])
