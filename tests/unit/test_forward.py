"""What administrators ask goes to the supervisor with a deadline and a bound, and is given up by hanging up."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import mkdtemp

import pytest

from gateway import forward
from gateway.admin_call import while_connected
from gateway.context import ClientGoneError
from gateway.forward import Forwarder
from protocol import PROTOCOL_VERSION
from protocol.control import (
    CliHello,
    LoadRequest,
    Progress,
    Result,
    StatusReply,
    StatusRequest,
    UnloadRequest,
    to_supervisor_decoder,
)
from protocol.errors import LmxError
from protocol.framing import FrameBuffer, frame
from protocol.messages import Message, encode
from protocol.states import CliExit, ModelState

HELLO = CliHello(PROTOCOL_VERSION, "test", "key:k1", "192.0.2.7", "req_1")
LOAD = LoadRequest("org/tiny", "")


class Supervisor:
    """Answers requests with what the test says, or not at all, and knows who is connected."""

    def __init__(self, answer: Callable[[Message], list[Message]]) -> None:
        self.heard: list[Message] = []
        self.connected = 0
        self.changed = asyncio.Event()
        self._answer = answer
        self.path = Path(mkdtemp(prefix="lmx-", dir="/tmp")) / "s.sock"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder, buffer = to_supervisor_decoder(), FrameBuffer(1 << 20)
        self._count(1)
        try:
            while data := await reader.read(4096):
                for body in buffer.feed(data):
                    self.heard.append(decoder.decode(body))
                    for message in self._answer(self.heard[-1]):
                        writer.write(frame(encode(message)))
        finally:
            self._count(-1)
            writer.close()

    def _count(self, more: int) -> None:
        self.connected += more
        self.changed.set()
        self.changed = asyncio.Event()

    async def until_connected(self, wanted: int) -> None:
        async with asyncio.timeout(20):
            while self.connected != wanted:
                await self.changed.wait()


@asynccontextmanager
async def supervisor(answer: Callable[[Message], list[Message]] = lambda _: []) -> AsyncIterator[Supervisor]:
    made = Supervisor(answer)
    server = await asyncio.start_unix_server(made.serve, made.path)
    try:
        yield made
    finally:
        server.close()
        made.path.unlink(missing_ok=True)
        made.path.parent.rmdir()


async def code_of(work: asyncio.Future[object] | asyncio.Task[object]) -> str:
    with pytest.raises(LmxError) as raised:
        await work
    return raised.value.code


async def test_the_supervisor_hears_who_asks_before_what() -> None:
    def answer(message: Message) -> list[Message]:
        return [Result(CliExit.OK, "done", 1, 2)] if isinstance(message, LoadRequest) else []

    async with supervisor(answer) as there:
        result = await Forwarder(there.path, 20).order(LOAD, HELLO)
        assert isinstance(result, Result)
        assert (result.message, there.heard) == ("done", [HELLO, LOAD])
        await there.until_connected(0)


async def test_what_could_not_be_done_is_the_error_that_the_supervisor_names() -> None:
    def answer(message: Message) -> list[Message]:
        return [Result(CliExit.FAILED, "no room", code="insufficient_memory")] * isinstance(message, LoadRequest)

    async with supervisor(answer) as there:
        assert await code_of(asyncio.create_task(Forwarder(there.path, 20).order(LOAD, HELLO))) == "insufficient_memory"


async def test_without_waiting_the_answer_is_that_it_has_begun() -> None:
    def answer(message: Message) -> list[Message]:
        return [Progress("org/tiny", ModelState.LOADING, 1, 2)] * isinstance(message, LoadRequest)

    async with supervisor(answer) as there:
        begun = await Forwarder(there.path, 20).order(LOAD, HELLO, wait=False)
        assert isinstance(begun, Progress)


async def test_a_supervisor_that_does_not_answer_costs_an_order_its_time_and_nobody_else_anything() -> None:
    async with supervisor() as there:
        assert await code_of(asyncio.create_task(Forwarder(there.path, 0.1).order(LOAD, HELLO))) == "timeout"
        await there.until_connected(0)


async def test_no_supervisor_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_DIAL_S", 0.05)
    forwarder = Forwarder(Path("/tmp/lmx-there-is-none.sock"), 20)
    assert await code_of(asyncio.create_task(forwarder.ask(StatusRequest(), HELLO))) == "supervisor_unavailable"


async def test_a_supervisor_that_ends_meanwhile_is_said_in_words() -> None:
    async with supervisor() as there:
        order = asyncio.create_task(Forwarder(there.path, 20).order(LOAD, HELLO))
        await there.until_connected(1)
        sent = asyncio.all_tasks() - {asyncio.current_task(), order}
        for task in sent:
            task.cancel()
        assert await code_of(order) == "supervisor_unavailable"


async def test_orders_are_bounded_and_keep_out_no_question_and_no_later_order() -> None:
    def answer(message: Message) -> list[Message]:
        return [StatusReply(b"{}")] if isinstance(message, StatusRequest) else []

    async with supervisor(answer) as there:
        forwarder = Forwarder(there.path, 20)
        orders = [asyncio.create_task(forwarder.order(LOAD, HELLO)) for _ in range(16)]
        await there.until_connected(16)
        unload = UnloadRequest("org/tiny")
        assert await code_of(asyncio.create_task(forwarder.order(unload, HELLO))) == "server_busy"
        assert await forwarder.ask(StatusRequest(), HELLO) == b"{}"
        orders[0].cancel()
        await there.until_connected(15)
        later = asyncio.create_task(forwarder.order(unload, HELLO))
        await there.until_connected(16)
        for task in (*orders, later):
            task.cancel()
        await asyncio.gather(*orders, later, return_exceptions=True)


async def test_a_client_that_hangs_up_frees_its_place_at_once() -> None:
    hung_up = asyncio.Event()

    async def receive() -> dict[str, str]:
        await hung_up.wait()
        return {"type": "http.disconnect"}

    async with supervisor() as there:
        order = Forwarder(there.path, 20).order(LOAD, HELLO)
        waiting = asyncio.create_task(while_connected(receive, order))
        await there.until_connected(1)
        hung_up.set()
        with pytest.raises(ClientGoneError):
            await waiting
        await there.until_connected(0)
