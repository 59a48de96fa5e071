"""A framed connection: nothing lost, nothing unbounded, no descriptor leaked (design 3)."""

import asyncio
import contextlib
import fcntl
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from protocol import channel as channel_module
from protocol.channel import Channel, ChannelClosedError, dial
from protocol.framing import frame

LIMIT = 1024 * 1024


@pytest_asyncio.fixture
async def pair() -> AsyncIterator[tuple[Channel, Channel]]:
    one, two = (Channel(sock, limit=LIMIT) for sock in socket.socketpair())
    yield one, two
    one.close()
    two.close()


@pytest_asyncio.fixture
async def half() -> AsyncIterator[tuple[Channel, socket.socket]]:
    """A channel and the bare socket at its other end."""
    one, two = socket.socketpair()
    channel = Channel(one, limit=LIMIT)
    yield channel, two
    channel.close()
    two.close()


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose socket paths are short enough."""
    with tempfile.TemporaryDirectory(prefix="lmx-", dir="/tmp") as folder:
        yield Path(folder)


def open_descriptors() -> int:
    folder = Path("/dev/fd")
    return len(os.listdir(folder))  # noqa: PTH208


async def soon(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - a channel has nobody to tell that it was closed
            await asyncio.sleep(0.001)


# -- frames ---------------------------------------------------------------------------------------------------------


async def test_frames_arrive_whole_and_in_order_both_ways(pair: tuple[Channel, Channel]) -> None:
    one, two = pair
    bodies = [b"", b"a", b"x" * LIMIT, b"last"]
    for body in bodies:
        one.send(body)
        two.send(body[::-1])
    assert [await two.receive() for _ in bodies] == bodies
    assert [await one.receive() for _ in bodies] == [body[::-1] for body in bodies]


async def test_a_stream_in_any_pieces_is_the_same_frames(half: tuple[Channel, socket.socket]) -> None:
    channel, sock = half
    for byte in frame(b"one") + frame(b"two"):
        sock.send(bytes([byte]))
        await asyncio.sleep(0)
    assert [await channel.receive(), await channel.receive()] == [b"one", b"two"]


async def test_a_frame_over_the_limit_closes_after_those_before_it(half: tuple[Channel, socket.socket]) -> None:
    channel, sock = half
    sock.send(frame(b"fine") + (LIMIT + 1).to_bytes(4, "big"))
    assert await channel.receive() == b"fine"
    with pytest.raises(ChannelClosedError, match="too large"):
        await channel.receive()
    assert channel.closed


async def test_after_the_peer_left_what_it_sent_is_read_and_then_its_end_is_told(
    pair: tuple[Channel, Channel],
) -> None:
    one, two = pair
    for number in range(3):
        one.send(b"%d" % number)
    one.close()
    await soon(lambda: two.closed)
    assert [await two.receive() for _ in range(3)] == [b"0", b"1", b"2"]
    for _ in range(2):
        with pytest.raises(ChannelClosedError, match="closed the connection"):
            await two.receive()
    with pytest.raises(ChannelClosedError):
        two.send(b"x")


async def test_sending_to_a_peer_that_has_left_does_not_lose_its_last_words(
    half: tuple[Channel, socket.socket],
) -> None:
    channel, other = half
    other.sendall(frame(b"these"))
    other.close()
    channel.send(b"before anything was read")
    assert channel.closed
    assert await channel.receive() == b"these"
    with pytest.raises(ChannelClosedError):
        await channel.receive()


async def test_one_who_waits_is_woken_by_the_end(pair: tuple[Channel, Channel]) -> None:
    one, two = pair
    waiting = asyncio.create_task(two.receive())
    await asyncio.sleep(0)
    one.close()
    with pytest.raises(ChannelClosedError):
        await asyncio.wait_for(waiting, 5)


async def test_closing_says_why_once_and_may_be_repeated(pair: tuple[Channel, Channel]) -> None:
    one, _ = pair
    one.close("first")
    one.close("second")
    with pytest.raises(ChannelClosedError, match="first"):
        await one.receive()


# -- bounds ---------------------------------------------------------------------------------------------------------


async def test_a_peer_that_does_not_read_is_closed_at_the_bound(half: tuple[Channel, socket.socket]) -> None:
    channel, _ = half
    sent = 0
    while not channel.closed:
        channel.send(b"x" * LIMIT)
        sent += LIMIT
    with pytest.raises(ChannelClosedError, match="does not read"):
        channel.send(b"x")
    assert 16 * LIMIT <= sent <= 18 * LIMIT


async def test_a_slow_peer_within_the_bound_gets_everything(half: tuple[Channel, socket.socket]) -> None:
    channel, sock = half
    bodies = [bytes([n]) * LIMIT for n in range(8)]
    for body in bodies:
        channel.send(body)
    sock.setblocking(False)
    got = bytearray()
    async with asyncio.timeout(20):
        while len(got) < 8 * (LIMIT + 4):
            got += await asyncio.get_running_loop().sock_recv(sock, 100_000)
    assert bytes(got) == b"".join(map(frame, bodies))
    channel.send(b"more")
    assert await asyncio.get_running_loop().sock_recv(sock, 100) == frame(b"more")


async def test_a_peer_that_floods_is_not_read_until_the_owner_has_caught_up(
    half: tuple[Channel, socket.socket],
) -> None:
    channel, sock = half
    sock.setblocking(False)
    body = b"x" * 10_000
    sent = 0
    for _ in range(200):
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += sock.send(frame(body))
        await asyncio.sleep(0)
    assert sent < (256 + 100) * 10_004, "the sender is held back by the kernel's buffer"
    assert len(channel._frames) <= 256 + 7
    for _ in range(sent // 10_004):
        assert await asyncio.wait_for(channel.receive(), 5) == body
    assert not channel.closed


# -- descriptors ----------------------------------------------------------------------------------------------------


async def test_a_descriptor_arrives_beside_its_frame_and_belongs_to_who_takes_it(
    pair: tuple[Channel, Channel],
) -> None:
    one, two = pair
    read, write = os.pipe()
    one.send(b"hello", (write,))
    os.close(write)
    assert await two.receive() == b"hello"
    taken = two.take_fd()
    assert taken is not None
    assert two.take_fd() is None
    two.close()
    os.write(taken, b"through")
    assert os.read(read, 10) == b"through"
    assert fcntl.fcntl(taken, fcntl.F_GETFD) & fcntl.FD_CLOEXEC, "our children must not inherit it"
    for descriptor in (read, taken):
        os.close(descriptor)


async def test_a_descriptor_that_nobody_takes_is_closed_with_the_channel(pair: tuple[Channel, Channel]) -> None:
    one, two = pair
    read, write = os.pipe()
    one.send(b"hello", (write,))
    os.close(write)
    await two.receive()
    two.close()
    assert os.read(read, 1) == b"", "the pipe has no writer left"
    os.close(read)


async def test_a_peer_cannot_fill_our_table_with_descriptors(half: tuple[Channel, socket.socket]) -> None:
    channel, sock = half
    read, write = os.pipe()
    before = open_descriptors()
    for _ in range(50):
        socket.send_fds(sock, [frame(b"x")], [write] * 4)
        await channel.receive()
    assert open_descriptors() - before <= 4
    channel.close()
    assert open_descriptors() < before
    for descriptor in (read, write):
        os.close(descriptor)


# -- dialling -------------------------------------------------------------------------------------------------------


async def test_dialling_waits_for_a_socket_that_appears_in_time(short: Path) -> None:
    path = short / "s.sock"
    dialling = asyncio.create_task(dial(path, limit=LIMIT, within_s=10))
    await asyncio.sleep(0.05)
    assert not dialling.done()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        channel = await dialling
        peer, _ = listener.accept()
        peer.send(frame(b"welcome"))
        assert await channel.receive() == b"welcome"
        peer.close()
        channel.close()


async def test_dialling_gives_up_with_an_oserror_and_leaks_nothing(short: Path) -> None:
    before = open_descriptors()
    begun = time.monotonic()
    with pytest.raises(FileNotFoundError):
        await dial(short / "s.sock", limit=LIMIT, within_s=0.2)
    assert 0.1 < time.monotonic() - begun < 5
    (short / "stale.sock").touch()
    with pytest.raises(OSError, match=r"refused|not a socket|socket"):
        await dial(short / "stale.sock", limit=LIMIT, within_s=0)
    assert open_descriptors() == before


async def test_a_listener_that_does_not_accept_does_not_stop_the_whole_loop(short: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(short / "s.sock"))
        listener.listen(0)
        with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
            for _ in range(20):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                sock.connect(str(short / "s.sock"))
        begun = time.monotonic()
        with pytest.raises(OSError, match=r"temporarily unavailable|refused"):
            await asyncio.wait_for(dial(short / "s.sock", limit=LIMIT, within_s=0.1), 10)
        assert time.monotonic() - begun < 5


def test_the_bounds_are_what_the_design_says() -> None:
    assert channel_module._MAX_UNSENT_BYTES == 16 * 1024 * 1024
