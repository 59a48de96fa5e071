"""What endpoints share: where bodies are parsed, how requests of a call differ, who wakes whom."""

import threading
import time
from typing import Any
from unittest.mock import Mock

import pytest
from starlette.types import Message, Scope

from gateway.bell import Bell
from gateway.calls import Calls, ask, seeded
from gateway.catalog import CatalogView
from gateway.chat import tool_calls
from gateway.context import RequestContext, attach
from gateway.logprobs import LEAST, LegacyWriter, Shown, chat_logprobs, mean, token_name
from gateway.numbers import Numbers
from gateway.requests import Extras, Request
from gateway.responses import Function, ToolCall
from gateway.traffic import Traffic
from protocol.config import GatewayConfig
from protocol.data import Finish, Kind, Sampling, TokenLogprob, ToolDelta, TopLogprob


@pytest.mark.parametrize(("size", "aside"), [(1000, False), (1024 * 1024, False), (1024 * 1024 + 1, True)])
async def test_a_large_body_is_parsed_beside_the_event_loop(size: int, aside: bool) -> None:
    calls = Calls(GatewayConfig(), CatalogView(), Mock(), Traffic(), Numbers())
    scope: Scope = {"type": "http", "headers": [], "state": {}}
    attach(scope, RequestContext("r", time.monotonic(), None))
    threads: list[int] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"x" * size}

    def parse(body: bytes, _config: GatewayConfig) -> int:
        threads.append(threading.get_ident())
        return len(body)

    assert await calls.parsed(scope, receive, Mock(), parse) == size
    assert (threads != [threading.get_ident()]) is aside


def test_seeds_follow_each_other_and_begin_anew_at_the_end() -> None:
    def seeds(seed: int | None, count: int) -> list[int | None]:
        return [made.sampling.seed for made in seeded(ask(Kind.CHAT, sampling=Sampling(seed=seed)), count)]

    assert seeds(None, 3) == [None, None, None]
    assert seeds(5, 3) == [5, 6, 7]
    assert seeds(2**63 - 1, 2) == [2**63 - 1, -(2**63)]


async def test_a_bell_names_each_ringer_once_until_it_is_heard() -> None:
    bell: Bell[Any] = Bell()
    one, two = Mock(spec=Request, rung=False), Mock(spec=Request, rung=False)
    for ringer in (two, one, two):
        bell.ring(ringer)
    assert await bell.news() == [two, one]
    bell.ring(one)
    assert await bell.news() == [one]
    bell.wake()
    assert await bell.news() == []


def test_tool_calls_are_put_together_in_order() -> None:
    pieces = [
        ToolDelta(1, "b", "g", "{"),
        ToolDelta(0, "a", "f"),
        ToolDelta(1, arguments="}"),
        ToolDelta(0, arguments="[]"),
    ]
    assert tool_calls(pieces) == [ToolCall("a", Function("f", "[]")), ToolCall("b", Function("g", "{}"))]


def one(token: str, logprob: float | None, raw: bytes | None = None, *tops: TopLogprob) -> TokenLogprob:
    return TokenLogprob(token, logprob, token.encode() if raw is None else raw, list(tops))


def test_json_has_no_infinity() -> None:
    made = chat_logprobs([one("x", float("-inf"), None, TopLogprob("y", float("nan"), b"y"))])
    assert (made.content[0].logprob, made.content[0].top_logprobs[0].logprob) == (LEAST, LEAST)


def test_legacy_offsets_count_characters_over_split_ones_and_chunks() -> None:
    writer = LegacyWriter()
    first = writer.shape([one("é", None), one("\ufffd", -1.0, b"\xe2\x98")])
    then = writer.shape([one("\ufffd", -1.0, b"\x83"), one("a", -1.0)])
    assert first.text_offset + then.text_offset == [0, 1, 1, 2]
    assert first.tokens == ["é", "bytes:\\xe2\\x98"]
    assert token_name("\ufffd", "\ufffd".encode()) == "\ufffd"


def test_of_two_tokens_with_one_name_the_likelier_counts() -> None:
    made = LegacyWriter().shape([one("a", -3.0, None, TopLogprob("a", -1.0, b"a"), TopLogprob("b", -2.0, b"b"))])
    assert made.top_logprobs == [{"a": -1.0, "b": -2.0}]


def test_the_mean_leaves_out_what_nothing_predicts() -> None:
    assert mean([one("a", None), one("b", -1.0), one("c", -2.0)]) == -1.5
    assert mean([one("a", None)]) == mean([]) == LEAST


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("a", 1), ("a ", 2), ("a bc", 2), ("a bcd", 3), ("a bcd☃", 5), ("another", 5)],
)
def test_tokens_that_the_text_shows_nothing_of_have_no_log_probabilities(text: str, count: int) -> None:
    """ "another" stands for text that is not its tokens: nothing is known of what it shows."""
    snowman = [one("\ufffd", -1.0, b"\xe2\x98"), one("\ufffd", -1.0, b"\x83")]
    found = [one("a", -1.0), one(" bc", -1.0), one("d", -1.0), *snowman]
    assert Shown().take(Extras(logprobs=found), text, Finish.STOP) == found[:count]
    assert Shown().take(Extras(logprobs=found), text, Finish.LENGTH) == found


def test_log_probabilities_wait_for_their_text() -> None:
    found = [one("a", -1.0), one(" E", -1.0), one("N", -1.0), one("Q", -1.0), one(" END", -1.0)]
    shown = Shown()
    assert shown.take(Extras(logprobs=found[:1]), "a", None) == found[:1]
    assert not shown.take(Extras(logprobs=found[1:2]), "", None)
    assert not shown.take(Extras(logprobs=found[2:3]), "", None)
    assert shown.take(Extras(logprobs=found[3:4]), " ENQ", None) == found[1:4]
    assert not shown
    assert not shown.take(Extras(logprobs=found[4:]), "", Finish.STOP)


def test_log_probabilities_of_thoughts_and_calls_wait_for_nothing() -> None:
    shown = Shown()
    assert shown.take(Extras(["hm"], [], [one("hm", -1.0)]), "", None) == [one("hm", -1.0)]
    assert shown.take(Extras(logprobs=[one("x", -1.0)]), "", None) == [one("x", -1.0)]
