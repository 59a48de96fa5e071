"""Drives one worker process as its supervisor and as its gateways, over the real sockets."""

import contextlib
import json
import os
import queue
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import zmq

from bench.host import json_lines
from protocol import PROTOCOL_VERSION, control, data
from protocol.config import LifecycleConfig, ModelsConfig
from protocol.framing import FrameBuffer, frame
from protocol.messages import MalformedMessageError, Message, encode
from protocol.spec import WorkerSpec, write_spec

REPOSITORY = Path(__file__).resolve().parents[1]
INCARNATION = 7
PATIENCE_S = 60.0

MessageT = TypeVar("MessageT", bound=Message)


class Supervisor:
    """Listens on a control socket and notes everything that is said to it."""

    def __init__(self, path: Path, *, lease_s: float = 900.0) -> None:
        self._path = path
        self._lease_s = lease_s
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(4)
        self._connection: socket.socket | None = None
        self._arrived: queue.Queue[Any] = queue.Queue()
        #: Held while what was read is not in the queue yet.
        self._reading = threading.Lock()
        self.messages: list[Any] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        decoder = control.to_supervisor_decoder()
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connection = connection
            buffer = FrameBuffer(control.MAX_FRAME_BYTES)
            with contextlib.suppress(OSError), connection:
                while True:
                    select.select([connection], [], [])
                    with self._reading:
                        received = connection.recv(65536)
                        if not received:
                            break
                        for body in buffer.feed(received):
                            message = decoder.decode(body)
                            if isinstance(message, control.WorkerHello):
                                self.send(control.Welcome(PROTOCOL_VERSION, self._lease_s))
                            self._arrived.put((time.monotonic(), message))

    def send(self, message: Message) -> None:
        assert self._connection is not None
        self._connection.sendall(frame(encode(message)))

    def wait(
        self, kind: type[MessageT], test: Callable[[MessageT], bool] = lambda _: True, timeout_s: float = PATIENCE_S
    ) -> MessageT:
        """Return the next message of that kind that passes the test; what comes before it is in `messages`."""
        until = time.monotonic() + timeout_s
        while True:
            try:
                _, message = self._arrived.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {kind.__name__} in {timeout_s} s; last: {self.messages[-3:]}") from None
            self.messages.append(message)
            if isinstance(message, kind) and test(message):
                return message

    def skip_arrived(self) -> None:
        """Put aside what has arrived, read or not, so that `wait` speaks of what comes from now on."""
        while True:
            with self._reading:
                if not self._has_unread():
                    with contextlib.suppress(queue.Empty):
                        while True:
                            self.messages.append(self._arrived.get_nowait()[1])
                    return
            time.sleep(0.001)  # the thread reads it

    def _has_unread(self) -> bool:
        """Return whether more lies in the connection: a process that was held finds a row of heartbeats there."""
        with contextlib.suppress(OSError, ValueError):  # it has just been closed
            return self._connection is not None and bool(select.select([self._connection], [], [], 0)[0])
        return False

    def close(self) -> None:
        """Be gone, socket file and all."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._path.unlink(missing_ok=True)


class Answer:
    """What a gateway heard about one request."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens: list[int] = []
        self.steps: list[int] = []
        self.accepted: data.Accepted | None = None
        self.finish: data.Finish | None = None
        self.usage: data.Usage | None = None
        self.error: data.Refused | data.Failed | None = None
        self.logprobs: list[data.TokenLogprob] = []
        #: (text, token ids, logprobs) of each delta.
        self.deltas: list[tuple[str, list[int], list[data.TokenLogprob]]] = []
        #: What is answered whole: embeddings, a ranking, tokens.
        self.reply: data.Embedded | data.Ranked | data.Tokenized | None = None
        #: How many messages about it came after its end: must stay 0.
        self.after_end = 0

    @property
    def done(self) -> bool:
        return self.finish is not None or self.error is not None or self.reply is not None

    @property
    def code(self) -> str:
        return "" if self.error is None else self.error.code


class Gateway:
    """A DEALER that follows its requests."""

    def __init__(self, context: "zmq.Context[Any]", endpoint: str) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(f"ipc://{endpoint}")
        self._decoder = data.from_worker_decoder()
        self._last_rid = 0
        self.answers: dict[int, Answer] = {}
        #: (step, number of deltas) of each step message.
        self.steps: list[tuple[int, int]] = []
        self.unreadable = 0
        self.other_incarnation = 0

    def submit(self, text: str = "hello", *, deadline_s: float = 60.0, **sampling: Any) -> int:
        self._last_rid += 1
        rid = self._last_rid
        messages = [data.ChatMessage("user", text)]
        wanted = data.Sampling(**({"temperature": 0.0} | sampling))
        self.answers[rid] = Answer()
        self.send(data.Submit(INCARNATION, rid, data.Kind.CHAT, messages, wanted, deadline_s, trace=f"req-{rid}"))
        return rid

    def request(self, kind: data.Kind, *inputs: str | list[int], sampling: Any = None, **fields: Any) -> int:
        """Submit a request of any kind; `fields` are of the Submit."""
        self._last_rid += 1
        rid = self._last_rid
        self.answers[rid] = Answer()
        wanted = data.Sampling(**({"temperature": 0.0} | (sampling or {})))
        messages = fields.pop("messages", [])
        deadline_s = fields.pop("deadline_s", 60.0)
        self.send(data.Submit(INCARNATION, rid, kind, messages, wanted, deadline_s, inputs=list(inputs), **fields))
        return rid

    def complete(self, prompt: str | list[int], *, echo: bool = False, group: int = 0, **sampling: Any) -> int:
        """Submit a raw prompt."""
        return self.request(data.Kind.COMPLETION, prompt, sampling=sampling, echo=echo, group=group)

    def abort(self, *rids: int) -> None:
        self.send(data.Abort(INCARNATION, list(rids)))

    def send(self, message: Message) -> None:
        self.send_raw(encode(message))

    def send_raw(self, *parts: bytes) -> None:
        self._socket.send_multipart(parts)

    def flood(self, message: Message, over: threading.Event) -> None:
        """Send the same message again and again, as fast as it is taken; reads nothing."""
        body = encode(message)
        while not over.is_set():
            with contextlib.suppress(zmq.Again):
                if self._socket.poll(50, zmq.POLLOUT):
                    self._socket.send(body, zmq.NOBLOCK)

    def until(self, condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
        """Read until the condition holds."""
        end = time.monotonic() + timeout_s
        while not condition():
            left = end - time.monotonic()
            if left <= 0 or not self._socket.poll(int(left * 1000) + 1):
                states = {rid: (a.text[:20], a.finish, a.code) for rid, a in self.answers.items() if not a.done}
                raise AssertionError(f"not in {timeout_s} s; open: {states}")
            self._on_frame(self._socket.recv())

    def finish(self, *rids: int, timeout_s: float = PATIENCE_S) -> list[Answer]:
        """Read until these requests have ended (all, if none is named)."""
        answers = [self.answers[rid] for rid in (rids or self.answers)]
        self.until(lambda: all(answer.done for answer in answers), timeout_s)
        return answers

    def ask(self, text: str = "hello", **sampling: Any) -> Answer:
        (answer,) = self.finish(self.submit(text, **sampling))
        return answer

    def close(self) -> None:
        self._socket.close()

    def _on_frame(self, received: bytes) -> None:
        try:
            message = self._decoder.decode(received)
        except MalformedMessageError:
            self.unreadable += 1
            return
        if message.incarnation != INCARNATION:
            self.other_incarnation += 1
            return
        if isinstance(message, data.Step):
            self.steps.append((message.step, len(message.deltas)))
            for delta in message.deltas:
                self._on_delta(message.step, delta)
            return
        answer = self.answers[message.rid]
        answer.after_end += answer.done
        if isinstance(message, data.Accepted):
            answer.accepted = message
        elif isinstance(message, data.Refused | data.Failed):
            answer.error = message
        else:
            answer.reply = message

    def _on_delta(self, step: int, delta: data.Delta) -> None:
        answer = self.answers[delta.rid]
        answer.after_end += answer.done
        answer.text += delta.text
        answer.tokens += delta.token_ids
        answer.logprobs += delta.logprobs
        answer.deltas.append((delta.text, delta.token_ids, delta.logprobs))
        answer.steps.append(step)
        answer.finish, answer.usage = delta.finish, delta.usage


class WorkerProcess:
    """A worker, its supervisor and its gateways; leaves nothing behind."""

    def __init__(
        self,
        path: Path | str = "/nonexistent",
        *,
        module: str = "tests.fault",
        models: ModelsConfig | None = None,
        lifecycle: LifecycleConfig | None = None,
        fault: dict[str, Any] | None = None,
        supervised: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`environment` is added to the process's own: the matrix library that makes a large model usable, say."""
        # Short: a unix socket's path has 103 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="lmx-", dir="/tmp"))
        self.control_path = self.folder / "s.sock"
        self.endpoint = self.folder / f"w.{INCARNATION}.sock"
        self.log = self.folder / "worker.log"
        self.stderr = self.folder / "worker.stderr"
        self.supervisor = Supervisor(self.control_path) if supervised else None
        self.spec = WorkerSpec(
            slot="w",
            model="org/tiny",
            incarnation=INCARNATION,
            path=str(path),
            endpoint=str(self.endpoint),
            control_socket=str(self.control_path),
            log_file=str(self.log),
            log_level="INFO",
            models=models or ModelsConfig(),
            lifecycle=lifecycle or LifecycleConfig(heartbeat_s=0.05),
        )
        spec_file = self.folder / "spec.json"
        write_spec(spec_file, self.spec)
        environ = os.environ | {"OPENBLAS_NUM_THREADS": "1"} | dict(environment or {})
        environ.pop("LMX_FAULT", None)
        if fault is not None:
            environ["LMX_FAULT"] = json.dumps(fault)
        with self.stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(spec_file)],
                cwd=REPOSITORY,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,
            )
        self._context: zmq.Context[Any] = zmq.Context()
        self._gateways: list[Gateway] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for gateway in self._gateways:
            gateway.close()
        self._context.term()
        if self.supervisor is not None:
            self.supervisor.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ready(self) -> Self:
        assert self.supervisor is not None
        self.supervisor.wait(control.Ready)
        return self

    def gateway(self) -> Gateway:
        gateway = Gateway(self._context, str(self.endpoint))
        self._gateways.append(gateway)
        return gateway

    def heartbeat(self, test: Callable[[control.Heartbeat], bool] = lambda _: True) -> control.Heartbeat:
        """Return the next heartbeat that passes the test and was surely made after this call."""
        assert self.supervisor is not None
        self.supervisor.skip_arrived()
        self.supervisor.wait(control.Heartbeat)  # this one may have been on its way
        return self.supervisor.wait(control.Heartbeat, test)

    def exit_code(self, timeout_s: float = PATIENCE_S) -> int:
        return self.process.wait(timeout_s)

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log lines of one event."""
        return [line for line in json_lines(self.log) if line["event"] == name]


@contextlib.contextmanager
def fault_worker(**options: Any) -> Iterator[WorkerProcess]:
    """A ready worker without MLX."""
    with WorkerProcess(**options) as worker:
        yield worker.ready()
