"""The command line's side of the control socket: every wait ends, every failure has words, and it starts quickly."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol import control
from protocol.framing import FrameBuffer, frame
from protocol.messages import Message, encode
from protocol.paths import Home
from protocol.statefile import StateFile
from protocol.states import ModelState
from supervisor.client import Client, UnreachableError, WaitedTooLongError

DOCUMENT = {
    "schema": "lmx.status/1",
    "supervisor": {"pid": 11, "uptime_s": 5.0, "state_durable": True},
    "gateway": None,
    "models": [],
}
REPLY = frame(encode(control.StatusReply(json.dumps(DOCUMENT).encode())))
#: What no command may wait for: the daemon, the servers, the model side, and what only some commands need.
HEAVY = {
    "httptools", "httpx", "huggingface_hub", "mlx", "mlx_lm", "numpy", "psutil", "rich", "starlette", "tenacity",
    "tokenizers", "torch", "transformers", "uvicorn", "uvloop", "zmq",
    "supervisor.commands", "supervisor.daemon", "supervisor.host", "supervisor.platform.blas", "supervisor.running",
}  # fmt: skip


@pytest.fixture
def home() -> Iterator[Home]:
    with tempfile.TemporaryDirectory(prefix="lmx-", dir="/tmp") as folder:
        home = Home(Path(folder))
        home.ensure()
        yield home


@contextlib.contextmanager
def supervisor(home: Home, *pieces: bytes, hang_up: bool = False) -> Iterator[list[bytes]]:
    """Serve one connection: send the pieces after the first request, then hang up or stay silent."""
    got: list[bytes] = []
    done = threading.Event()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(home.control_socket))
    listener.listen()
    listener.settimeout(20)

    def serve() -> None:
        with contextlib.suppress(OSError):
            sock, _ = listener.accept()
            with sock:
                # A hello and a request.
                while len(list(FrameBuffer(1000).feed(b"".join(got)))) < 2:
                    got.append(sock.recv(65536))
                    if not got[-1]:
                        return
                for piece in pieces:
                    sock.sendall(piece)
                    time.sleep(0.002)
                if not hang_up:
                    done.wait(20)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield got
    finally:
        done.set()
        listener.close()
        thread.join(20)


def ask(home: Home, *, within_s: float = 5.0) -> bytes:
    client = Client(home)
    try:
        return client.status(within_s=within_s)
    finally:
        client.close()


def test_status_is_what_the_supervisor_says(home: Home) -> None:
    with supervisor(home, REPLY) as got:
        assert json.loads(ask(home)) == DOCUMENT
    assert b"".join(got)[4:6] == encode(control.CliHello(1, ""))[:2]


def test_an_answer_in_any_pieces_and_behind_other_messages_is_found(home: Home) -> None:
    other: Message = control.Progress("one", ModelState.LOADING, 1, 2)
    with supervisor(home, frame(encode(other)), REPLY[:1], REPLY[1:7], REPLY[7:]):
        assert json.loads(ask(home)) == DOCUMENT


def test_without_a_supervisor_it_says_where_it_looked(home: Home) -> None:
    with pytest.raises(UnreachableError, match=rf"no supervisor answers on {home.control_socket} \(No such file"):
        Client(home)
    home.control_socket.touch()
    with pytest.raises(UnreachableError, match="no supervisor answers"):
        Client(home)


def test_a_path_that_is_too_long_is_told_in_words() -> None:
    with pytest.raises(UnreachableError, match=r"\(AF_UNIX path too long\)"):
        Client(Home(Path("/tmp") / ("x" * 200)))


def test_a_supervisor_that_does_not_answer_is_waited_for_so_long_and_no_longer(home: Home) -> None:
    begun = time.monotonic()
    with supervisor(home), pytest.raises(WaitedTooLongError, match="did not answer in time"):
        ask(home, within_s=0.1)
    assert time.monotonic() - begun < 5


def test_a_supervisor_that_only_trickles_is_not_waited_for_longer(home: Home) -> None:
    trickle = [REPLY[n : n + 1] for n in range(len(REPLY) - 1)]
    with supervisor(home, *trickle), pytest.raises(WaitedTooLongError):
        ask(home, within_s=0.1)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "hung up before it was done"),
        (REPLY[:-1], "hung up before it was done"),
        (frame(b"garbage"), "is it another version"),
        (frame(encode(control.StatusRequest())), "is it another version"),
        (b"\xff\xff\xff\xff", "is it another version"),
    ],
    ids=["nothing", "half", "garbage", "no answer", "huge"],
)
def test_an_answer_that_is_none_is_told_in_words(home: Home, answer: bytes, words: str) -> None:
    with supervisor(home, answer, hang_up=True), pytest.raises(UnreachableError, match=words):
        ask(home)


def test_the_end_of_a_supervisor_can_be_waited_for(home: Home) -> None:
    with supervisor(home, frame(encode(control.Result(0, "stopping"))), hang_up=True):
        client = Client(home)
        client._send(control.StopRequest())
        client.wait_closed(within_s=5)
        client.close()
    home.control_socket.unlink()
    with supervisor(home):
        client = Client(home)
        with pytest.raises(WaitedTooLongError):
            client.wait_closed(within_s=0.05)
        client.close()


# -- the command line -----------------------------------------------------------------------------------------------


def run(home: Home, *arguments: str) -> tuple[int, str, set[str]]:
    """Run one command; return its exit code, what it printed, and the modules it had imported at its end."""
    program = """
import sys
from supervisor.cli import main
code = 0
try:
    main()
except SystemExit as end:
    code = end.code
print(*sys.modules, file=sys.stderr)
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "LMX_HOME": str(home.root)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, set(done.stderr.splitlines()[-1].split())


def test_status_imports_nothing_that_it_does_not_need(home: Home) -> None:
    with supervisor(home, REPLY):
        code, out, modules = run(home, "status")
    assert code == 0
    assert out.startswith("supervisor  pid 11")
    assert modules & HEAVY == set()
    assert {"supervisor.client", "supervisor.screen"} <= modules


def test_status_of_a_dead_supervisor_imports_nothing_heavy_either(home: Home) -> None:
    snapshot = {"saved_at": time.time() - 61, "snapshot": DOCUMENT}
    StateFile(home.state / "runtime", kind="lmx.runtime", schema=1).save(snapshot)
    code, out, modules = run(home, "status")
    assert code == 4
    assert "1 min" in out
    assert modules & HEAVY == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["unload", "x"], ["nonsense"]], ids=str)
def test_no_command_pays_for_the_daemon(home: Home, arguments: list[str]) -> None:
    code, _, modules = run(home, *arguments)
    assert code in {0, 2, 4}
    assert modules & HEAVY == set()


def test_the_start_of_the_command_line_is_measured(home: Home) -> None:
    """Printed only (pytest -s): a loaded machine may take any time."""
    times = []
    for _ in range(3):
        begun = time.monotonic()
        run(home, "--version")
        times.append(time.monotonic() - begun)
    print(f"lmx-supervisor --version: {min(times):.3f} s")  # noqa: T201
