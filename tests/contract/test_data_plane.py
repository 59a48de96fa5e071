"""Golden bytes of the data plane: what is on the wire today must be readable, and written, for ever.

A field may be appended with a default (its golden line grows then, the shorter bytes stay readable); nothing else may
change. A test that fails here means that a new gateway and an old worker no longer understand each other.
"""

from typing import Any, get_args

import msgspec
import pytest

from protocol.data import (
    Abort,
    Accepted,
    ChatMessage,
    ChatOptions,
    Delta,
    Embedded,
    Failed,
    Finish,
    FromWorker,
    Kind,
    Ranked,
    Refused,
    Resume,
    Sampling,
    Step,
    Submit,
    Tokenized,
    TokenLogprob,
    ToolCall,
    ToolChoice,
    ToolDelta,
    TopLogprob,
    ToWorker,
    Usage,
    from_worker_decoder,
    to_worker_decoder,
)
from protocol.messages import Decoder, MalformedMessageError, encode

#: Each message with every field set (and, where fields are optional, once without them), and its bytes.
GOLDEN: tuple[tuple[Any, str], ...] = (
    (
        Submit(
            7,
            2**63 + 1,
            Kind.CHAT,
            [
                ChatMessage("system", "Be brief."),
                ChatMessage("user", "Grüße 🌍", "ada"),
                ChatMessage("assistant", "", None, (ToolCall("call_1", "f", "{}"),), None, "Hm."),
                ChatMessage("tool", "4", tool_call_id="call_1"),
            ],
            Sampling(64, 0.5, 0.9, 42, ("END", "\n\n"), 40, 0.1, 0.2, 0.3, 1.1, {5: -100.0}, 2),
            30.0,
            "req-1",
            "10.0.0.2",
            3,
            Resume([5, 6]),
            ChatOptions(b"[]", ToolChoice.NAMED, "f", False, True, b"{}", b"{}", True, "low", True),
            ["text", [1, 2]],
            True,
            9,
            256,
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "key:abc",
            4,
        ),
        (
            "dc00130107cf8000000000000001019496a673797374656da942652062726965662ec090c0c096a475736572ac4772c3"
            "bcc39f6520f09f8c8da361646190c0c096a9617373697374616e74a0c09193a663616c6c5f31a166a27b7dc0a3486d2e"
            "96a4746f6f6ca134c090a663616c6c5f31c09c40cb3fe0000000000000cb3feccccccccccccd2a92a3454e44a20a0a28"
            "cb3fb999999999999acb3fc999999999999acb3fd3333333333333cb3ff199999999999a8105cbc05900000000000002"
            "cb403e000000000000a57265712d31a831302e302e302e3203919205069ac4025b5d04a166c2c3c4027b7dc4027b7dc3"
            "a36c6f77c392a474657874920102c309cd0100d93730302d306166373635313931366364343364643834343865623231316338"
            "30333139632d623761643662373136393230333333312d3031a76b65793a61626304"
        ),
    ),
    (
        Submit(1, 1, Kind.CHAT, [ChatMessage("user", "hi")], Sampling(), 900.0),
        (
            "dc0013010101019196a475736572a26869c090c0c09cc0cb3fe6666666666666cb3ff0000000000000c09000cb000000"
            "0000000000cb0000000000000000cb0000000000000000cb3ff000000000000080c0cb408c200000000000a0a000c0c0"
            "90c20000a0a000"
        ),
    ),
    (
        Abort(7, [1, 2**64 - 1]),
        "9302079201cfffffffffffffffff",
    ),
    (
        Accepted(7, 1, 12, 4),
        "952107010c04",
    ),
    (
        Step(
            7,
            99,
            [
                Delta(1, "a", [5]),
                Delta(
                    2,
                    "",
                    [6, 7],
                    Finish.TOOL_CALLS,
                    Usage(12, 3, 4),
                    "Hm.",
                    [ToolDelta(0, "call_1", "f", "{")],
                    [TokenLogprob("a", -0.5, b"a", [TopLogprob("b", -1.5, b"b")]), TokenLogprob("c", None, b"c")],
                ),
            ],
        ),
        (
            "94220763929801a1619105c0c0a090909802a092060703930c0304a3486d2e919400a663616c6c5f31a166a17b9294a1"
            "61cbbfe0000000000000c401619193a162cbbff8000000000000c4016294a163c0c4016390"
        ),
    ),
    (
        Refused(7, 1, "server_busy", "Try again later.", "messages", 5),
        "97230701ab7365727665725f62757379b054727920616761696e206c617465722ea86d6573736167657305",
    ),
    (
        Embedded(7, 1, [b"\x00\x00\x80\x3f"], 12),
        "9525070191c4040000803f0c",
    ),
    (
        Ranked(7, 1, [0.5, 0.25], 12),
        "9526070192cb3fe0000000000000cb3fd00000000000000c",
    ),
    (
        Tokenized(7, 1, [1, 2], "a b"),
        "95270701920102a3612062",
    ),
    (
        Failed(7, 1, "worker_crashed", "It ended.", True),
        "96240701ae776f726b65725f63726173686564a9497420656e6465642ec3",
    ),
)

DECODERS: tuple[Decoder[Any], Decoder[Any]] = (to_worker_decoder(), from_worker_decoder())


def decoder_of(message: Any) -> Decoder[Any]:
    return DECODERS[0] if isinstance(message, get_args(ToWorker)) else DECODERS[1]


IDS = [f"{type(message).__name__}-{number}" for number, (message, _) in enumerate(GOLDEN)]


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=IDS)
def test_written_bytes_do_not_change(message: Any, golden: str) -> None:
    assert encode(message).hex() == golden


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=IDS)
def test_golden_bytes_are_read(message: Any, golden: str) -> None:
    assert decoder_of(message).decode(bytes.fromhex(golden)) == message


def test_every_message_has_golden_bytes() -> None:
    assert {type(message) for message, _ in GOLDEN} == set(get_args(ToWorker | FromWorker))


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=IDS)
def test_a_field_appended_by_a_later_version_is_ignored(message: Any, golden: str) -> None:
    values = msgspec.msgpack.decode(bytes.fromhex(golden))
    longer = msgspec.msgpack.encode([*values, "from the future", {"k": 1}])
    assert decoder_of(message).decode(longer) == message


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=IDS)
def test_fields_with_defaults_may_be_missing(message: Any, golden: str) -> None:
    fields = msgspec.structs.fields(type(message))
    required = sum(field.required for field in fields)
    shorter = msgspec.msgpack.decode(bytes.fromhex(golden))[: 1 + required]
    old = decoder_of(message).decode(msgspec.msgpack.encode(shorter))
    for field in fields[required:]:
        default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
        assert getattr(old, field.name) == default


def test_no_optional_field_stands_before_a_required_one() -> None:
    for kind in {type(message) for message, _ in GOLDEN}:
        required = [field.required for field in msgspec.structs.fields(kind)]
        assert required == sorted(required, reverse=True), kind


@pytest.mark.parametrize(
    "frame", [b"", b"\xc1", b"\x91\xcc\xff", b"\x90", b"\x93\x01\x02", b"\x81\xa1a\x01", b"\x91" * 2000, bytes(64)]
)
def test_other_bytes_are_one_kind_of_error(frame: bytes) -> None:
    for decoder in DECODERS:
        with pytest.raises(MalformedMessageError):
            decoder.decode(frame)
