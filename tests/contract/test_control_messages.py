"""Golden bytes of the control plane: what is on the wire today must be readable, and written, for ever.

A field may be appended with a default (its golden line grows then, the shorter bytes stay readable); nothing else may
change. A test that fails here means that a new gateway and an old worker no longer understand each other.
"""

from typing import Any, get_args

import msgspec
import pytest

from protocol.control import (
    Assign,
    Capabilities,
    Casualties,
    Catalog,
    CatalogModel,
    CliHello,
    CrashesReply,
    CrashesRequest,
    Drain,
    Drained,
    Dying,
    EventsRequest,
    FitReply,
    FitRequest,
    FromSupervisor,
    GatewayHeartbeat,
    GatewayHello,
    GatewayReady,
    HandoverRequest,
    Heartbeat,
    JournalEntry,
    Loading,
    LoadRequest,
    Misbehaved,
    Ping,
    PinRequest,
    Progress,
    Ready,
    Relieve,
    ReloadRequest,
    ResetRequest,
    RestartRequest,
    Result,
    ResumeRequest,
    SpareHello,
    StatusReply,
    StatusRequest,
    Stop,
    StopRequest,
    ToSupervisor,
    UnloadRequest,
    Wanted,
    Welcome,
    WorkerHello,
    from_supervisor_decoder,
    to_supervisor_decoder,
)
from protocol.messages import Decoder, MalformedMessageError, encode
from protocol.states import ModelState, Phase

#: Each message with every field set (and, where fields are optional, once without them), and its bytes.
GOLDEN: tuple[tuple[Any, str], ...] = (
    (
        WorkerHello(
            1,
            "tiny-1a2b",
            "org/tiny",
            7,
            4242,
            "/h/run/tiny-1a2b.7.sock",
            Phase.IDLE,
            "0.1.0",
            Capabilities(8192, 540_000_000, ["chat"], 32, False),
            2.5,
            "/models/tiny",
        ),
        (
            "9c0101a974696e792d31613262a86f72672f74696e7907cd1092b72f682f72756e2f74696e792d316132622e372e736f"
            "636ba469646c65a5302e312e3096cd2000ce202fbf0091a46368617420c2cb0000000000000000cb4004000000000000ac2f6d6f64656c732f"
            "74696e79"
        ),
    ),
    (
        WorkerHello(1, "s", "m", 1, 2, "/e", Phase.LOADING, "0.1.0"),
        "9c0101a173a16d0102a22f65a76c6f6164696e67a5302e312e30c0cb0000000000000000a0",
    ),
    (
        GatewayHello(1, 3, 4243, "0.1.0"),
        "95020103cd1093a5302e312e30",
    ),
    (
        CliHello(1, "0.1.0"),
        "960301a5302e312e30a0a0a0",
    ),
    (
        CliHello(1, "0.1.0", "key:k7", "10.0.0.7", "req_1"),
        "960301a5302e312e30a66b65793a6b37a831302e302e302e37a57265715f31",
    ),
    (
        SpareHello(1, 9, 4244, "0.1.0"),
        "95040109cd1094a5302e312e30",
    ),
    (
        Loading(1_000_000, 540_000_000, "weights"),
        "9408ce000f4240ce202fbf00a777656967687473",
    ),
    (
        Ready(Capabilities(8192, 540_000_000, ["chat"], 32, False), 2.5),
        "930996cd2000ce202fbf0091a46368617420c2cb0000000000000000cb4004000000000000",
    ),
    (
        Heartbeat(Phase.DECODE, 1234, 0.25, 16, 3, 600_000_000, 1_000, 700_000_000, 99, 24, 5_000, 9_000),
        "9d0aa66465636f6465cd04d2cb3fd00000000000001003ce23c34600cd03e8ce29b927006318cd1388cd2328",
    ),
    (
        Dying(87, "Metal ran out of memory"),
        "930b57b74d6574616c2072616e206f7574206f66206d656d6f7279",
    ),
    (
        Drained(),
        "910c",
    ),
    (
        Welcome(1, 120.0),
        "931001cb405e000000000000",
    ),
    (
        Drain(30.0, True),
        "9311cb403e000000000000c3",
    ),
    (
        Stop("too much", "insufficient_memory"),
        "9312a8746f6f206d756368b3696e73756666696369656e745f6d656d6f7279",
    ),
    (
        Catalog(
            5,
            [
                CatalogModel(
                    "org/tiny",
                    ModelState.READY,
                    1_700_000_000,
                    7,
                    "/h/run/tiny.7.sock",
                    Capabilities(8192, 540_000_000, ["chat"], 32, False),
                ),
                CatalogModel(
                    "b",
                    ModelState.BACKOFF,
                    1,
                    error_code="model_restarting",
                    reason="SIGABRT",
                    retry_after_s=5,
                    done_bytes=1,
                    total_bytes=2,
                    on_demand=True,
                ),
            ],
            True,
        ),
        (
            "941305929ca86f72672f74696e79a57265616479ce6553f10007b22f682f72756e2f74696e792e372e736f636b96cd20"
            "00ce202fbf0091a46368617420c2cb0000000000000000a0a0c00000c29ca162a76261636b6f66660100a0c0b06d6f64656c5f726573746172"
            "74696e67a753494741425254050102c3c3"
        ),
    ),
    (
        Ping(),
        "9214c400",
    ),
    (
        Ping(b"{}"),
        "9214c4027b7d",
    ),
    (
        Assign(b"{}"),
        "9215c4027b7d",
    ),
    (
        GatewayReady(),
        "9118",
    ),
    (
        GatewayHeartbeat(8, 40, True),
        "94190828c3",
    ),
    (
        StatusRequest(True),
        "9220c3",
    ),
    (
        LoadRequest("org/tiny", "/models/tiny", True, 3600.0),
        "9521a86f72672f74696e79ac2f6d6f64656c732f74696e79c3cb40ac200000000000",
    ),
    (
        Relieve(5.0, True, 4, 5.0),
        "9516cb4014000000000000c304cb4014000000000000",
    ),
    (
        FitRequest("org/tiny", "/models/tiny"),
        "9328a86f72672f74696e79ac2f6d6f64656c732f74696e79",
    ),
    (
        PinRequest("org/tiny", True),
        "9329a86f72672f74696e79c3",
    ),
    (
        FitReply(b"{}"),
        "9233c4027b7d",
    ),
    (
        UnloadRequest("org/tiny"),
        "9222a86f72672f74696e79",
    ),
    (
        RestartRequest("org/tiny", True),
        "9323a86f72672f74696e79c3",
    ),
    (
        StopRequest(),
        "9124",
    ),
    (
        ResetRequest("org/tiny"),
        "9225a86f72672f74696e79",
    ),
    (
        ResumeRequest(),
        "9126",
    ),
    (
        Casualties("org/tiny", 7, ["bot-1", "req_2"]),
        "941aa86f72672f74696e790792a5626f742d31a57265715f32",
    ),
    (
        Misbehaved("org/tiny", 7),
        "931ba86f72672f74696e7907",
    ),
    (
        Wanted("org/tiny"),
        "921ca86f72672f74696e79",
    ),
    (
        HandoverRequest(),
        "9127",
    ),
    (
        StatusReply(b"{}"),
        "9230c4027b7d",
    ),
    (
        Progress("org/tiny", ModelState.LOADING, 1, 2, "weights"),
        "9631a86f72672f74696e79a76c6f6164696e670102a777656967687473",
    ),
    (
        Result(0, "ready", 41, 42),
        "963200a57265616479292aa0",
    ),
    (
        Result(1, "no", 0, 0, "conflict"),
        "963201a26e6f0000a8636f6e666c696374",
    ),
    (
        ReloadRequest(),
        "912a",
    ),
    (
        CrashesRequest("2026"),
        "922ba432303236",
    ),
    (
        EventsRequest(20, 1.5),
        "932c14cb3ff8000000000000",
    ),
    (
        CrashesReply(b"{}"),
        "9234c4027b7d",
    ),
    (
        JournalEntry(b"{}"),
        "9235c4027b7d",
    ),
)

DECODERS: tuple[Decoder[Any], Decoder[Any]] = (to_supervisor_decoder(), from_supervisor_decoder())


def decoder_of(message: Any) -> Decoder[Any]:
    return DECODERS[0] if isinstance(message, get_args(ToSupervisor)) else DECODERS[1]


IDS = [f"{type(message).__name__}-{number}" for number, (message, _) in enumerate(GOLDEN)]


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=IDS)
def test_written_bytes_do_not_change(message: Any, golden: str) -> None:
    assert encode(message).hex() == golden


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=IDS)
def test_golden_bytes_are_read(message: Any, golden: str) -> None:
    assert decoder_of(message).decode(bytes.fromhex(golden)) == message


def test_every_message_has_golden_bytes() -> None:
    assert {type(message) for message, _ in GOLDEN} == set(get_args(ToSupervisor | FromSupervisor))


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
        assert getattr(old, field.name) == (field.default if field.default is not msgspec.NODEFAULT else ())


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
