"""The data socket against a gateway that does not read: real ZeroMQ, small pipes."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from protocol.data import Delta, Step, from_worker_decoder
from worker import link as link_module
from worker.link import DataLink

TEXT = "x" * 1000


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Iterator[DataLink]:
    monkeypatch.setattr(link_module, "HIGH_WATER_MARK", 4)
    with tempfile.TemporaryDirectory(prefix="lmx-", dir="/tmp") as folder:
        link = DataLink(f"{folder}/w.sock", 7)
        link.bind()
        yield link
        link.close(0.1)
        assert not list(Path(folder).iterdir())


@pytest.fixture
def dealer(link: DataLink) -> Iterator["zmq.Socket[bytes]"]:
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.RCVHWM, 4)
    dealer.setsockopt(zmq.RCVBUF, 4096)
    dealer.connect(f"ipc://{link._path}")
    yield dealer
    dealer.close()
    context.term()


def introduce(link: DataLink, dealer: "zmq.Socket[bytes]") -> bytes:
    dealer.send(b"hi")
    assert link.wait(10)[0]
    received = link.receive()
    assert received is not None
    assert received[1] == b"hi"
    return received[0]


def step(number: int) -> Step:
    return Step(7, number, [Delta(1, f"{number}:{TEXT} ", [number])])


def test_text_for_a_gateway_that_pauses_is_merged_and_whole(link: DataLink, dealer: "zmq.Socket[bytes]") -> None:
    gateway = introduce(link, dealer)
    for number in range(900):
        link.send(gateway, step(number))
    assert link.blocked
    text, messages, decoder = "", 0, from_worker_decoder()
    until = time.monotonic() + 60
    while text.count(" ") < 900:
        link.retry()
        if dealer.poll(20):
            message = decoder.decode(dealer.recv())
            assert isinstance(message, Step)
            text += message.deltas[0].text
            messages += 1
        assert time.monotonic() < until
    assert text == "".join(f"{number}:{TEXT} " for number in range(900))
    assert messages < 900
    assert not link.blocked
    assert link.take_losses() == (set(), [])


def test_an_answer_with_too_much_unsent_is_reported_and_others_go_on(
    link: DataLink, dealer: "zmq.Socket[bytes]"
) -> None:
    gateway = introduce(link, dealer)
    for number in range(2500):
        link.send(gateway, step(number))
    gone, slow = link.take_losses()
    assert gone == set()
    assert slow[0] == (gateway, 1)
    assert link.take_losses() == (set(), [])


def test_a_gateway_that_is_gone_is_reported_once(link: DataLink, dealer: "zmq.Socket[bytes]") -> None:
    gateway = introduce(link, dealer)
    dealer.close()
    until = time.monotonic() + 60
    gone: set[bytes] = set()
    while not gone:
        link.probe({gateway}, 1)
        link.retry()
        link.wait(0)  # ZeroMQ lets go of a full pipe only when its other direction has been read to the end
        gone, _ = link.take_losses()
        assert time.monotonic() < until
    assert gone == {gateway}


def test_a_gateway_that_was_never_there_is_gone(link: DataLink) -> None:
    link.send(b"nobody", step(1))
    assert link.take_losses() == ({b"nobody"}, [])
