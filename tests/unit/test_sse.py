"""The framing of a stream, read back by two independent readers: the specification's, and one that splits widely."""

import json
from typing import Any
from unittest.mock import Mock

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.chunks import ChatChunks, TextChunks
from gateway.requests import Extras, Request
from gateway.responses import CompletionUsage, PromptTokensDetails
from gateway.sse import DONE, KEEPALIVE, frame, json_line
from protocol.data import Delta, Finish, TokenLogprob, ToolDelta, TopLogprob

any_text = st.text(st.characters(exclude_categories=["Cs"])) | st.text(
    "ab\n\r\x85\u2028\u2029\x0b\x0c\x1c ", max_size=9
)


def events(stream: bytes) -> list[tuple[str, str]]:
    """Parse as the HTML standard says: events end with a blank line, lines end with CR, LF or both."""
    found = []
    name, data = "", []
    for line in stream.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if line == "":
            if data:
                found.append((name, "\n".join(data)))
            name, data = "", []
        elif not line.startswith(":"):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            assert field in {"data", "event"}
            if field == "event":
                name = value
            else:
                data.append(value)
    return found


@given(st.lists(any_text.filter(bool), min_size=1))
def test_frames_survive_any_line_ends(texts: list[str]) -> None:
    stream = KEEPALIVE.join(frame(text.encode()) for text in texts)
    whole = [("", text.replace("\r\n", "\n").replace("\r", "\n")) for text in texts]
    assert events(stream) == whole


def test_named_events() -> None:
    assert frame(b"x", "error") == b"event: error\ndata: x\n\n"
    assert DONE == b"data: [DONE]\n\n"


@given(any_text, any_text, st.booleans())
def test_content_chunks_carry_any_text(text: str, model: str, usage: bool) -> None:
    chunk = ChatChunks("chatcmpl-1", 5, model, "fp", usage=usage).text(0, text)
    # `splitlines` ends lines in eleven places, as httpx does: only the two of the frame may remain.
    first, second = chunk.decode().splitlines()
    assert second == ""
    body = json.loads(first.removeprefix("data: "))
    assert body["choices"] == [{"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}]
    assert (body["model"], body["id"], body["created"]) == (model, "chatcmpl-1", 5)
    assert ("usage" in body) is usage


def pieces(writer: ChatChunks | TextChunks, delta: Delta) -> list[dict[str, Any]]:
    """What the stream of a request that got one delta holds, each event on one line whoever splits it."""
    request = Mock(spec=Request)
    extras = Extras([delta.reasoning] if delta.reasoning else [], delta.tool_calls, delta.logprobs)
    request.extras = extras if delta.reasoning or delta.tool_calls or delta.logprobs else None
    request.finish = delta.finish
    request.take.return_value = delta.text
    request.take_extras.return_value = extras
    lines = writer.piece(0, request).decode().splitlines()
    assert lines[1::2] == [""] * (len(lines) // 2)
    return [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[::2]]


@settings(deadline=None)
@given(any_text, any_text, any_text, any_text)
def test_every_kind_of_chunk_carries_any_text(text: str, thought: str, arguments: str, token: str) -> None:
    logprob = TokenLogprob(token, -1.0, token.encode(), [TopLogprob(token, -1.0, token.encode())])
    delta = Delta(1, text, [1], None, None, thought, [ToolDelta(0, "c", "f", arguments)], [logprob])
    found = pieces(ChatChunks("a", 1, "m", "fp", usage=False), delta)
    deltas = [choice["delta"] for choice in found]
    assert "".join(delta.get("content", "") for delta in deltas) == text
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == thought
    (call,) = [call for delta in deltas for call in delta.get("tool_calls", [])]
    function = {"name": "f", "arguments": arguments}
    assert call == {"index": 0, "id": "c", "type": "function", "function": function}
    # Logprobs come once, whatever came with them.
    (scored,) = [choice["logprobs"]["content"] for choice in found if choice["logprobs"]]
    assert (scored[0]["token"], bytes(scored[0]["bytes"]).decode()) == (token, token)
    (choice,) = pieces(TextChunks("a", 1, "m", "fp", usage=False), delta)
    assert (choice["text"], choice["logprobs"]["tokens"]) == (text, [token])


@given(any_text)
def test_json_line_is_json(text: str) -> None:
    assert json.loads(json_line(text)) == text


def test_no_chunk_has_an_id_field() -> None:
    writer = ChatChunks("a", 1, "m", "fp", usage=True)
    usage = CompletionUsage(1, 2, 3, PromptTokensDetails(0))
    stream = (
        writer.begin(0)
        + KEEPALIVE
        + writer.text(0, "id: 5\nid: 6")
        + writer.finish(0, Finish.STOP)
        + writer.usage(usage)
    )
    assert not [line for line in stream.split(b"\n") if line.startswith(b"id")]


def test_one_stream_from_end_to_end() -> None:
    writer = ChatChunks("a", 1, "m", "fp", usage=True)
    usage = CompletionUsage(1, 2, 3, PromptTokensDetails(0))
    stream = writer.begin(0) + writer.text(0, "hi") + writer.finish(0, Finish.LENGTH) + writer.usage(usage) + DONE
    *bodies, last = [data for _, data in events(stream)]
    parsed: list[dict[str, Any]] = [json.loads(body) for body in bodies]
    assert last == "[DONE]"
    assert [b["usage"] and b["usage"]["total_tokens"] for b in parsed] == [None, None, None, 3]
    assert [b["choices"][0]["finish_reason"] for b in parsed[:3]] == [None, None, "length"]
    assert parsed[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert parsed[2]["choices"][0]["delta"] == {}
    assert parsed[3]["choices"] == []
