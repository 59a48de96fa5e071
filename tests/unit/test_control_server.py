"""Who may talk to the supervisor, and that one bad peer harms nobody else (design 3)."""

import asyncio
import errno
import itertools
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from protocol import PROTOCOL_VERSION, control
from protocol.channel import Channel, ChannelClosedError, dial
from protocol.framing import frame
from protocol.messages import encode
from supervisor import server as server_module
from supervisor.platform import current_platform
from supervisor.server import Connection, ControlServer
from tests.logkit import logged

HELLO = control.CliHello(PROTOCOL_VERSION, "test")


class Place:
    """The system as it is, but it may lie about who connects."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, int] | OSError] = []

    def peer(self, sock: socket.socket) -> tuple[int, int]:
        answer = self.answers.pop(0) if self.answers else current_platform().peer(sock)
        if isinstance(answer, OSError):
            raise answer
        return answer


class Desk:
    """Answers each request with a `Result` that counts; a `StopRequest` makes it fail."""

    def __init__(self) -> None:
        self.hellos: list[control.Hello] = []
        self.pids: list[int] = []

    async def serve(self, hello: control.Hello, connection: Connection) -> None:
        self.hellos.append(hello)
        self.pids.append(connection.pid)
        for number in range(1_000_000):
            if isinstance(await connection.receive(), control.StopRequest):
                raise ZeroDivisionError
            connection.channel.send(encode(control.Result(number, "done")))


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lmx-", dir="/tmp") as folder:
        yield Path(folder) / "supervisor.sock"


@pytest.fixture
def place() -> Place:
    return Place()


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest_asyncio.fixture
async def server(path: Path, place: Place, desk: Desk) -> AsyncIterator[ControlServer]:
    server = ControlServer(path, place, desk.serve)  # type: ignore[arg-type]
    server.open()
    yield server
    await server.close()


async def connect(path: Path, *, hello: bool = True) -> Channel:
    channel = await dial(path, limit=control.MAX_FRAME_BYTES, within_s=1)
    if hello:
        channel.send(encode(HELLO))
    return channel


async def ask(channel: Channel) -> control.FromSupervisor:
    channel.send(encode(control.StatusRequest()))
    return control.from_supervisor_decoder().decode(await asyncio.wait_for(channel.receive(), 5))


async def served(server: ControlServer, connections: int) -> None:
    """Wait until no more than these are left."""
    async with asyncio.timeout(5):
        while len(server._tasks) > connections:  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0.001)


async def closed(channel: Channel) -> bool:
    with pytest.raises(ChannelClosedError):
        await asyncio.wait_for(channel.receive(), 5)
    return True


@pytest_asyncio.fixture
async def neighbour(server: ControlServer, path: Path) -> AsyncIterator[Channel]:
    """Somebody well-behaved, whom nothing of the others may disturb."""
    channel = await connect(path)
    assert await ask(channel) == control.Result(0, "done")
    yield channel
    assert await ask(channel) == control.Result(1, "done")
    channel.close()


async def test_a_peer_is_known_by_its_hello_and_by_what_the_system_says(
    server: ControlServer, path: Path, desk: Desk
) -> None:
    channel = await connect(path)
    assert await ask(channel) == control.Result(0, "done")
    assert (desk.hellos, desk.pids) == ([HELLO], [os.getpid()])
    channel.close()


async def test_the_socket_is_for_this_user_alone(server: ControlServer, path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600


async def test_another_user_is_refused(neighbour: Channel, path: Path, place: Place, desk: Desk) -> None:
    place.answers = [(os.geteuid() + 1, 99)]
    with logged() as seen:
        assert await closed(await connect(path))
    assert [(entry["event"], entry["uid"]) for entry in seen] == [("control_refused", os.geteuid() + 1)]
    assert len(desk.hellos) == 1


async def test_a_peer_that_the_system_cannot_name_is_refused(neighbour: Channel, path: Path, place: Place) -> None:
    place.answers = [OSError(errno.ENOTCONN, "Socket is not connected"), PermissionError("unknown form")]
    with logged() as seen:
        assert await closed(await connect(path, hello=False))
        assert await closed(await connect(path, hello=False))
    assert [entry["reason"] for entry in seen] == ["Socket is not connected", "unknown form"]


async def test_one_who_does_not_say_hello_in_time_is_closed(
    neighbour: Channel, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server_module._HELLO_S == 5
    monkeypatch.setattr(server_module, "_HELLO_S", 0.1)
    assert await closed(await connect(path, hello=False))


@pytest.mark.parametrize(
    "first",
    [
        frame(b"garbage"),
        frame(b""),
        frame(b"\x9c" + b"\xff" * 100),
        frame(b"\xdd\xff\xff\xff\xff"),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 100,
        frame(encode(control.StatusRequest())),
        frame(encode(control.Ping())),
    ],
    ids=["text", "empty", "array", "long array", "http", "huge frame", "no hello", "not for us"],
)
async def test_a_bad_hello_closes_that_connection_and_harms_no_other(
    neighbour: Channel, path: Path, desk: Desk, first: bytes
) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        sock.connect(str(path))
        sock.send(first)
        assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 10), 5) == b""
    assert desk.hellos == [HELLO]


async def test_garbage_after_the_hello_and_a_failing_handler_harm_no_other(neighbour: Channel, path: Path) -> None:
    with logged() as seen:
        for body in (b"\xffgarbage", encode(control.StopRequest())):
            channel = await connect(path)
            channel.send(body)
            assert await closed(channel)
    assert [entry["event"] for entry in seen] == ["control_protocol_error", "internal_error"]
    assert seen[1]["exc_type"] == "ZeroDivisionError"


async def test_one_who_leaves_at_once_harms_no_other(neighbour: Channel, path: Path, server: ControlServer) -> None:
    for hello in (False, True):
        (await connect(path, hello=hello)).close()
    await served(server, 1)


async def test_connections_are_limited_and_a_place_is_free_again_when_one_leaves(
    neighbour: Channel, path: Path, monkeypatch: pytest.MonkeyPatch, server: ControlServer
) -> None:
    assert server_module._MAX_CONNECTIONS == 256
    monkeypatch.setattr(server_module, "_MAX_CONNECTIONS", 3)
    second, third = await connect(path), await connect(path)
    assert await ask(third) == control.Result(0, "done")
    with logged() as seen:
        assert await closed(await connect(path))
    assert seen[0]["event"] == "control_refused"
    second.close()
    await served(server, 2)
    again = await connect(path)
    assert await ask(again) == control.Result(0, "done")
    for channel in (third, again):
        channel.close()


async def test_running_out_of_descriptors_is_waited_out_and_not_shouted(
    neighbour: Channel, path: Path, server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listening socket stays readable all the while: without a pause this is a busy loop."""
    monkeypatch.setattr(server_module, "_ACCEPT_RETRY_S", 0.1)
    real = server._sock
    assert real is not None
    tried_at: list[float] = []

    class Full:
        """The same socket, which cannot accept for a while."""

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def accept(self) -> Any:
            tried_at.append(asyncio.get_running_loop().time())
            if len(tried_at) <= 2:
                raise OSError(errno.EMFILE, "Too many open files")
            return real.accept()

    monkeypatch.setattr(server, "_sock", Full())
    with logged() as seen:
        channel = await connect(path)
        assert await ask(channel) == control.Result(0, "done")
    assert {entry["event"] for entry in seen} == {"control_accept_failed"}
    assert len(seen) <= 2
    assert all(later - earlier > 0.09 for earlier, later in itertools.pairwise(tried_at[:3]))
    channel.close()


async def test_a_leftover_socket_file_is_no_obstacle_and_none_is_left(path: Path, desk: Desk) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    server = ControlServer(path, current_platform(), desk.serve)
    server.open()
    channel = await connect(path)
    assert await ask(channel) == control.Result(0, "done")
    await server.close()
    assert await closed(channel)
    assert not path.exists()


async def test_closing_ends_every_conversation_also_one_that_has_just_begun(server: ControlServer, path: Path) -> None:
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208
    channels = [await connect(path, hello=n % 2 == 0) for n in range(6)]
    server._accept()
    await server.close()
    for channel in channels:
        assert await closed(channel)
    assert len(os.listdir("/dev/fd")) < before  # noqa: PTH208
