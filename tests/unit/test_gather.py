"""Prompts that arrive together begin together, and nobody waits who is alone."""

import asyncio
from collections.abc import Sequence
from queue import Queue
from time import monotonic
from typing import Any, cast
from unittest.mock import Mock

import pytest
import uvicorn
from starlette.types import Message, Scope

from gateway.calls import Calls, ask
from gateway.catalog import CatalogView
from gateway.context import Connection, RequestContext, attach
from gateway.numbers import Numbers
from gateway.server import Arrivals, HttpProtocol
from gateway.traffic import Traffic
from protocol.config import GatewayConfig
from protocol.control import Catalog, CatalogModel
from protocol.data import ChatMessage, Kind, Sampling, Submit
from protocol.errors import LmxError
from protocol.states import ModelState, WorkerExit
from tests.unit.test_worker_policy import GATEWAY, INCARNATION, Desk
from worker.engine import Engine
from worker.gather import Gathering
from worker.jobs import AT_LENGTH, NO_SCORES, Command, End, Job, Remove, Scores, Status, Token


def test_who_is_alone_begins_at_once_also_when_asking_again_and_again() -> None:
    gathering = Gathering()
    for turn in range(20):
        now = 100.0 + turn
        gathering.came(0, now)
        assert gathering.wait_s(now) == 0
        gathering.begin()
        gathering.ended(1, now + 0.5)


def test_a_prompt_waits_for_those_the_gateway_has_read_and_for_no_longer() -> None:
    gathering = Gathering()
    gathering.came(2, 100.0)
    gathering.came(1, 100.001)
    assert gathering.wait_s(100.001) > 0
    gathering.came(0, 100.002)
    assert gathering.wait_s(100.002) == 0, "the last one is here"
    gathering.begin()
    gathering.came(1, 200.0)
    assert gathering.wait_s(200.01) == 0, "who does not come is not waited for"


def test_however_many_come_the_first_one_waits_20_ms_at_most() -> None:
    gathering = Gathering()
    now = 100.0
    while now < 100.02:
        gathering.came(1000, now)
        now += 0.001
    assert gathering.wait_s(100.0201) == 0


def test_clients_whose_answers_ended_together_are_expected_together() -> None:
    gathering = Gathering()
    gathering.ended(3, 100.0)
    gathering.came(0, 100.001)
    assert gathering.wait_s(100.001) > 0
    gathering.came(0, 100.002)
    gathering.came(0, 100.003)
    assert gathering.wait_s(100.003) == 0, "all are back"
    gathering.begin()
    gathering.ended(3, 200.0)
    gathering.came(0, 201.0)
    assert gathering.wait_s(201.0) == 0, "that was long ago"


class Recording:
    """A backend that generates one token for each job, and notes which jobs a step began with."""

    prefilling = False
    scores: Scores = NO_SCORES

    def __init__(self, commands: "Queue[Command]") -> None:
        self.groups: list[list[int]] = []
        self.removed: list[int] = []
        self._new: list[int] = []
        self._commands = commands

    def __len__(self) -> int:
        return len(self._new)

    def insert(self, job: Job) -> None:
        self._new.append(job.id)

    def remove(self, jobs: Sequence[int]) -> None:
        self.removed += jobs

    def step(self) -> list[Token]:
        self.groups.append(self._new)
        begun, self._new = self._new, []
        self._commands.put(End(WorkerExit.ASKED, ""))
        return [(job, 5, AT_LENGTH) for job in begun]


def _run(*given: Command) -> Recording:
    commands: Queue[Command] = Queue()
    for command in given:
        commands.put(command)
    backend = Recording(commands)
    Engine(backend, commands, lambda _: None, Status()).run()
    return backend


def test_the_engine_begins_with_all_of_a_group_in_one_step() -> None:
    assert _run(Job(1, [5], 1, coming=2), Job(2, [5], 1, coming=1), Job(3, [5], 1)).groups == [[1, 2, 3]]


def test_the_engine_waits_for_a_while_and_then_begins_with_what_is_there() -> None:
    began = monotonic()
    assert _run(Job(1, [5], 1, coming=5)).groups == [[1]]
    assert monotonic() - began >= 0.003


def test_a_job_that_is_removed_while_it_waits_is_nothing_begun() -> None:
    backend = _run(Job(1, [5], 1, coming=2), Remove([1]), Job(2, [5], 1))
    assert backend.groups == [[2]]
    assert backend.removed == [1]


def _asked(rid: int, coming: int) -> Submit:
    messages = [ChatMessage("user", "hi")]
    return Submit(INCARNATION, rid, Kind.CHAT, messages, Sampling(max_tokens=8), 100.0, coming=coming)


def test_nobody_waits_for_requests_that_will_have_no_slot() -> None:
    desk = Desk(slots=2, queue_depth=4)
    for rid in (1, 2, 3):
        desk.book.submit(GATEWAY, _asked(rid, coming=9), 0.0)
    desk.step(1, {1: "a"}, AT_LENGTH, now=1.0)
    jobs = [command for command in desk.commands if isinstance(command, Job)]
    assert [(job.id, job.coming) for job in jobs] == [(1, 1), (2, 0), (3, 0)]


class Crowd:
    """A connection beside others; their requests are read in the next turn of the loop."""

    def __init__(self) -> None:
        self.others = 0

    def take_up(self) -> int:
        asyncio.get_running_loop().call_soon(setattr, self, "others", 3)
        return self.others


async def test_the_gateway_looks_for_others_before_it_says_that_none_come() -> None:
    catalog = CatalogView()
    catalog.replace(Catalog(1, [CatalogModel("tiny", ModelState.READY, 0, 1, "nowhere")]))
    pool = Mock()
    calls = Calls(GatewayConfig(), catalog, pool, Traffic(), Numbers())
    scope: Scope = {"type": "http", "headers": [], "state": {}}
    attach(scope, RequestContext("r", monotonic(), cast(Connection, Crowd())))
    asked = [ask(Kind.CHAT, messages=[ChatMessage("user", "hi")])]

    async def receive() -> Message:
        return await asyncio.get_running_loop().create_future()

    async with calls.entered(scope, receive, "tiny", asked, timeout_s=5.0):
        (entered,) = [call.args[0] for call in pool.desk_of.return_value.enter.call_args_list]
    assert entered.message(1).coming == 3


async def test_a_model_that_is_unloaded_while_the_gateway_looks_for_others_is_not_asked() -> None:
    catalog = CatalogView()
    catalog.replace(Catalog(1, [CatalogModel("tiny", ModelState.READY, 0, 1, "nowhere")]))
    connection, pool = Mock(), Mock()

    def take_up() -> int:
        asyncio.get_running_loop().call_soon(catalog.replace, Catalog(2, []))
        return 0

    connection.take_up = take_up
    calls = Calls(GatewayConfig(), catalog, pool, Traffic(), Numbers())
    scope: Scope = {"type": "http", "headers": [], "state": {}}
    attach(scope, RequestContext("r", monotonic(), connection))
    with pytest.raises(LmxError, match="does not exist"):
        async with calls.entered(scope, Mock(), "tiny", [ask(Kind.CHAT)], timeout_s=5.0):
            pass
    pool.desk_of.assert_not_called()


_REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n"


async def _nothing(_scope: Any, _receive: Any, _send: Any) -> None:
    """Answer nobody."""


async def test_the_gateway_counts_what_has_arrived_in_full_and_nobody_works_on() -> None:
    arrivals = Arrivals()
    config = uvicorn.Config(_nothing, log_config=None)
    server = uvicorn.Server(config)
    config.load()

    def connect() -> HttpProtocol:
        protocol = HttpProtocol(arrivals, config=config, server_state=server.server_state, app_state={})
        transport = Mock()
        transport.is_closing.return_value = False
        protocol.connection_made(transport)
        return protocol

    first, second, third = connect(), connect(), connect()
    first.data_received(_REQUEST + b"{}")
    second.data_received(_REQUEST + b"{")
    third.data_received(_REQUEST + b"{}")
    assert arrivals.count == 2, "the body of the second is not here yet"
    assert first.take_up() == 1
    assert first.take_up() == 1, "it counts once"
    second.data_received(b"}")
    assert first.take_up() == 2
    for gone in (second, third):
        gone.connection_lost(None)
    assert first.take_up() == 0, "who is gone is not waited for"
    first.data_received(_REQUEST + b"{}")
    assert arrivals.count == 0, "who waits behind an answer on his connection does not come at once"
    first.connection_lost(None)
    await asyncio.gather(*server.server_state.tasks)
