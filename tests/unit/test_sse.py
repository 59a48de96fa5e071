"""The framing of a stream, read back by two independent readers: the specification's, and one that splits widely."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.chunks import ChatChunks
from gateway.responses import CompletionUsage, PromptTokensDetails
from gateway.sse import DONE, KEEPALIVE, frame, json_line
from protocol.data import Finish

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
    chunk = ChatChunks("chatcmpl-1", 5, model, "fp", usage=usage).content(0, text)
    # `splitlines` ends lines in eleven places, as httpx does: only the two of the frame may remain.
    first, second = chunk.decode().splitlines()
    assert second == ""
    body = json.loads(first.removeprefix("data: "))
    assert body["choices"] == [{"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}]
    assert (body["model"], body["id"], body["created"]) == (model, "chatcmpl-1", 5)
    assert ("usage" in body) is usage


@given(any_text)
def test_json_line_is_json(text: str) -> None:
    assert json.loads(json_line(text)) == text


def test_no_chunk_has_an_id_field() -> None:
    writer = ChatChunks("a", 1, "m", "fp", usage=True)
    usage = CompletionUsage(1, 2, 3, PromptTokensDetails(0))
    stream = (
        writer.begin(0)
        + KEEPALIVE
        + writer.content(0, "id: 5\nid: 6")
        + writer.finish(0, Finish.STOP)
        + writer.usage(usage)
    )
    assert not [line for line in stream.split(b"\n") if line.startswith(b"id")]


def test_one_stream_from_end_to_end() -> None:
    writer = ChatChunks("a", 1, "m", "fp", usage=True)
    usage = CompletionUsage(1, 2, 3, PromptTokensDetails(0))
    stream = writer.begin(0) + writer.content(0, "hi") + writer.finish(0, Finish.LENGTH) + writer.usage(usage) + DONE
    *bodies, last = [data for _, data in events(stream)]
    parsed: list[dict[str, Any]] = [json.loads(body) for body in bodies]
    assert last == "[DONE]"
    assert [b["usage"] and b["usage"]["total_tokens"] for b in parsed] == [None, None, None, 3]
    assert [b["choices"][0]["finish_reason"] for b in parsed[:3]] == [None, None, "length"]
    assert parsed[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert parsed[2]["choices"][0]["delta"] == {}
    assert parsed[3]["choices"] == []
