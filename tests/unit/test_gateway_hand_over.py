"""The end of a gateway that another one takes over from."""

import asyncio
import time
from unittest.mock import Mock

import pytest

from gateway import service
from gateway.service import Service


async def test_what_arrived_while_the_gateway_was_held_up_is_read_before_its_connection_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "_LET_GO_AFTER_S", 0.3)
    leaving = Service.__new__(Service)
    leaving._loop = asyncio.get_running_loop()
    server, traffic = Mock(), Mock(running=0)
    leaving._server, leaving._traffic = server, traffic
    server.connection_count.return_value = 1
    closed = asyncio.Event()
    server.close_idle.side_effect = closed.set
    going = asyncio.create_task(leaving._let_go(60))
    await asyncio.sleep(0)
    time.sleep(0.4)  # noqa: ASYNC251 - the machine holds this process up, and a request arrives
    while not server.connection_count.called:  # noqa: ASYNC110 - it looks before anything is read
        await asyncio.sleep(0)
    assert not closed.is_set()
    traffic.running = 1  # now it has been read
    await asyncio.sleep(0.5)
    assert not closed.is_set()
    traffic.running = 0
    await asyncio.wait_for(closed.wait(), 20)
    server.connection_count.return_value = 0
    assert await asyncio.wait_for(going, 20)
