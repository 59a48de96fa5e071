"""A worker as the gateway sees it, without a worker."""

import time
from typing import Any
from unittest.mock import Mock

from gateway.numbers import ModelNumbers
from gateway.peer import WorkerPeer
from gateway.requests import RequestState
from protocol.data import Delta, Step
from protocol.messages import encode


class Held:
    """A request with a token; while the next one is written to its client, the process is held up."""

    ended = False
    finish = None
    state = RequestState.STREAMING
    hold_s = 0.0

    def __init__(self) -> None:
        self.tokens = [0]

    def add(self, _delta: Delta, **_more: Any) -> bool:
        time.sleep(self.hold_s)  # what the machine does
        return True


async def test_the_time_between_two_tokens_does_not_shrink_when_the_gateway_is_held_up_over_the_first() -> None:
    numbers, request = ModelNumbers(), Held()
    peer = WorkerPeer(Mock(), "tiny", 1, "", slots=1, owner=Mock(), numbers=numbers)
    peer._requests[1] = request  # type: ignore[assignment]
    frame = encode(Step(1, 1, [Delta(1, "a", [1])]))
    request.hold_s = 0.05
    peer.on_frame(frame)
    request.hold_s = 0.0
    peer.on_frame(frame)
    assert sum(numbers.gap.counts) == 1
    assert numbers.gap.total >= 0.05
