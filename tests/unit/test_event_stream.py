"""Events go to the connection directly while the client keeps up, else through `send`: the same bytes either way."""

import asyncio
import json
import random
from typing import Any
from unittest.mock import Mock

import pytest
from starlette.types import Message

from gateway.bell import Bell
from gateway.call import Call
from gateway.calls import ask
from gateway.chunks import ChatChunks
from gateway.context import ClientGoneError, RequestContext
from gateway.requests import Request
from gateway.sse import DONE, KEEPALIVE
from gateway.stream import EventStream
from protocol.data import Delta, Finish, Kind, Sampling, TokenLogprob, ToolDelta, Usage
from protocol.errors import LmxError


class Scene:
    """One stream, what it wrote, and which way."""

    def __init__(self, *, direct: bool = True, keepalive_s: float = 60.0, logprobs: int | None = None) -> None:
        self.takes = True
        self.put: list[bytes] = []
        self.sent: list[Message] = []
        self.written: list[bytes] = []
        self.commented = asyncio.Event()
        self.room = asyncio.Event()
        self.room.set()
        bell: Bell[Request] = Bell()
        self.bell = bell
        loop_time = asyncio.get_running_loop().time()
        asked = ask(Kind.CHAT, sampling=Sampling(logprobs=logprobs))
        self.request = Request("m", asked, bell, limit=1000, streams=True, continues=False, deadline_at=loop_time + 60)
        context = RequestContext("req-1", loop_time, None)
        call = Call(Mock(id="m", capabilities=None), context, [self.request], [self.request], bell, Mock())
        call.enter()
        self.request.submitted()
        writer = ChatChunks("id", 1, "m", "f", usage=False)
        put = self._put if direct else None
        self.stream = EventStream(call, writer, self._send, include_usage=False, keepalive_s=keepalive_s, put=put)
        self.task = asyncio.create_task(self.stream.run())

    def _put(self, data: bytes) -> bool:
        if self.takes:
            self.put.append(data)
            self.written.append(data)
            if data == KEEPALIVE:
                self.commented.set()
        return self.takes

    async def _send(self, message: Message) -> None:
        await self.room.wait()
        self.sent.append(message)
        self.written.append(message.get("body", b""))

    async def say(self, *texts: str, finish: Finish | None = None) -> None:
        for text in texts:
            usage = None if finish is None else Usage(1, 1)
            self.request.add(Delta(self.request.rid, text, [5], finish, usage))
            await turns()

    async def begin(self) -> None:
        await turns()
        self.request.accept(1, 0)
        await turns()


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_what_is_written_directly_is_what_would_have_been_sent() -> None:
    written = []
    for direct in (True, False):
        scene = Scene(direct=direct)
        await scene.begin()
        await scene.say("one", " two", " three")
        await scene.say(" four", finish=Finish.STOP)
        await scene.task
        assert len(scene.put) == (3 if direct else 0)
        assert scene.sent[-1]["more_body"] is False
        written.append(scene.written)
    assert written[0] == written[1]
    assert written[0][-1].endswith(DONE)


async def test_a_client_that_takes_nothing_is_waited_for_and_gets_what_came_meanwhile_in_one_piece() -> None:
    scene = Scene()
    await scene.begin()
    await scene.say("one")
    scene.takes = False
    scene.room.clear()
    await scene.say(" two", " three", " four")
    assert scene.bell.blocked, "from here on what waits is bounded"
    scene.takes = True
    scene.room.set()
    await turns()
    await scene.say(" five", " six", finish=Finish.STOP)
    await scene.task
    text = b"".join(scene.written)
    places = [text.index(word) for word in (b'"one"', b'" two"', b'" three four"', b'" five"')]
    assert places == sorted(places)
    assert len(scene.put) == 2, "before and after"


def text_of(written: list[bytes]) -> str:
    lines = b"".join(written).decode().splitlines()
    bodies = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert [body["choices"][0]["delta"].get("role") for body in bodies] == ["assistant"] + [None] * (len(bodies) - 1)
    return "".join(body["choices"][0]["delta"].get("content", "") for body in bodies)


async def test_text_that_goes_on_is_written_before_anybody_else_has_a_turn() -> None:
    scene = Scene()
    await scene.begin()
    await scene.say("one")
    before = len(scene.put)
    scene.request.add(Delta(scene.request.rid, " two", [6]))
    assert len(scene.put) == before + 1
    assert scene.request.tokens == [5, 6]
    await turns()
    assert len(scene.put) == before + 1, "once"
    scene.task.cancel()


async def test_text_that_others_follow_at_once_is_written_with_them() -> None:
    scene = Scene()
    await scene.begin()
    await scene.say("one")
    before = len(scene.put)
    scene.request.add(Delta(scene.request.rid, " two", [6]), more=True)
    scene.request.add(Delta(scene.request.rid, " three", [7]))
    assert len(scene.put) == before, "nothing goes before what came before it"
    await turns()
    assert len(scene.put) == before + 1
    assert text_of(scene.written) == "one two three"
    scene.task.cancel()


@pytest.mark.parametrize("seed", range(30))
async def test_whichever_way_text_goes_it_arrives_whole_and_in_order(seed: int) -> None:
    chance = random.Random(seed)
    scene = Scene(keepalive_s=chance.choice([60.0, 0.0005]))
    await scene.begin()
    expected = ""
    for number in range(60):
        scene.takes = chance.random() < 0.8
        if chance.random() < 0.3:
            scene.room.clear()
        else:
            scene.room.set()
        text = chance.choice(["", f" {number}"])
        expected += text
        scene.request.add(Delta(scene.request.rid, text, [number]), more=chance.random() < 0.3)
        if chance.random() < 0.6:
            await turns(chance.randrange(4))
        if chance.random() < 0.05:
            await asyncio.sleep(0.001)
    scene.room.set()
    await scene.say(" end", finish=Finish.STOP)
    await scene.task
    assert text_of(scene.written) == expected + " end"
    assert scene.request.tokens == [*range(60), 5]


@pytest.mark.parametrize("logprobs", [None, 0])
async def test_what_comes_beside_text_goes_with_it_whichever_way_the_rest_goes(logprobs: int | None) -> None:
    def scored(text: str) -> list[TokenLogprob]:
        return [] if logprobs is None else [TokenLogprob(text, -0.5, text.encode(), [])]

    written = []
    for direct in (True, False):
        scene = Scene(direct=direct, logprobs=logprobs)
        await scene.begin()
        rid = scene.request.rid
        for delta in (
            Delta(rid, "one", [1], logprobs=scored("one")),
            # Text may come later than its tokens, and a token's end without it.
            Delta(rid, "", [2], logprobs=scored(" two")),
            Delta(rid, " t", [3]),
            Delta(rid, "wo", [4], reasoning="hm" if logprobs is None else ""),
            Delta(rid, " three", [5], logprobs=scored(" three")),
            Delta(rid, " four", [6], tool_calls=[ToolDelta(0, "id", "f", "{}")] if logprobs is None else []),
            Delta(rid, " five", [7], Finish.STOP, Usage(1, 7), logprobs=scored(" five")),
        ):
            scene.request.add(delta)
            await turns()
        await scene.task
        written.append(b"".join(scene.written))
    assert written[0] == written[1]
    assert b"hm" in written[0] or logprobs is not None


async def test_one_that_is_watched_is_told_of_its_mark_though_its_text_could_go_directly() -> None:
    scene = Scene()
    await scene.begin()
    await scene.say("one")
    scene.request.owner = owner = Mock()
    scene.request.mark = 3
    await scene.say(" two")
    owner.on_mark.assert_not_called()
    await scene.say(" three")
    owner.on_mark.assert_called_once_with(scene.request)
    assert text_of(scene.written) == "one two three"
    scene.task.cancel()


async def test_text_that_is_written_directly_is_no_silence() -> None:
    scene = Scene()
    await scene.begin()
    await scene.say("one")
    scene.stream._wrote_at -= 1000.0
    await scene.say(" two")
    scene.stream._timer.cancel()
    scene.stream._tick()
    await turns()
    assert KEEPALIVE not in scene.put
    scene.task.cancel()


async def test_silence_is_broken_by_comments_that_are_written_directly_too() -> None:
    scene = Scene(keepalive_s=0.01)
    await scene.begin()
    await asyncio.wait_for(scene.commented.wait(), 5)
    scene.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scene.task


async def test_an_error_in_the_middle_ends_the_stream_with_its_event() -> None:
    scene = Scene()
    await scene.begin()
    await scene.say("one")
    scene.request.fail(LmxError("worker_crashed", "It ended."))
    await scene.task
    assert b"event: error" in scene.written[-1]
    assert DONE not in scene.written[-1]


async def test_a_client_that_leaves_ends_the_task() -> None:
    scene = Scene()
    await scene.begin()
    await scene.say("one")
    before = len(scene.put)
    scene.bell.leave()
    scene.request.add(Delta(scene.request.rid, " two", [6]))
    assert len(scene.put) == before, "nobody is there"
    with pytest.raises(ClientGoneError):
        await scene.task


@pytest.mark.parametrize("method", ["piece", "text"])
async def test_a_failure_while_writing_reaches_the_boundary(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def broken(*_: Any) -> bytes:
        raise ZeroDivisionError

    scene = Scene()
    await scene.begin()
    if method == "text":
        await scene.say("zero")
    monkeypatch.setattr(ChatChunks, method, broken)
    await scene.say("one")
    with pytest.raises(ZeroDivisionError):
        await scene.task
