"""However the kernel cuts the stream, the same frames come out of it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.framing import FrameBuffer, FrameTooLargeError, frame

LIMIT = 1000


@given(st.lists(st.binary(max_size=60), max_size=12), st.lists(st.integers(0, 400), max_size=20))
def test_any_split_of_a_stream_gives_the_same_frames(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(map(frame, bodies))
    places = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    buffer = FrameBuffer(LIMIT)
    pieces = [stream[a:b] for a, b in pairwise(places)] or [stream]
    assert [body for piece in pieces for body in buffer.feed(piece)] == bodies


def test_byte_by_byte_gives_the_same_frames() -> None:
    bodies = [b"", b"a", b"x" * LIMIT, b"\x00\x00\x00\x01"]
    buffer = FrameBuffer(LIMIT)
    stream = b"".join(map(frame, bodies))
    assert [body for byte in stream for body in buffer.feed(bytes([byte]))] == bodies


def test_a_frame_comes_out_only_when_it_is_whole() -> None:
    buffer = FrameBuffer(LIMIT)
    assert list(buffer.feed(frame(b"hello")[:-1])) == []
    assert list(buffer.feed(b"o" + frame(b"x")[:3])) == [b"hello"]


@pytest.mark.parametrize("length", [LIMIT + 1, 2**31, 2**32 - 1])
def test_a_frame_over_the_limit_is_refused_by_its_length_alone(length: int) -> None:
    buffer = FrameBuffer(LIMIT)
    feed = buffer.feed(frame(b"fine") + length.to_bytes(4, "big") + b"x")
    assert next(feed) == b"fine"
    with pytest.raises(FrameTooLargeError):
        next(feed)


def test_a_frame_of_exactly_the_limit_passes() -> None:
    assert list(FrameBuffer(LIMIT).feed(frame(b"x" * LIMIT))) == [b"x" * LIMIT]


@given(st.lists(st.binary(max_size=300), max_size=6))
def test_noise_gives_frames_or_is_refused(pieces: list[bytes]) -> None:
    buffer = FrameBuffer(LIMIT)
    try:
        for piece in pieces:
            for body in buffer.feed(piece):
                assert len(body) <= LIMIT
    except FrameTooLargeError:
        return
