"""What the supervisor remembers, and how it says so when the disk does not take it (design 9)."""

import errno
import hashlib
import json
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from protocol.paths import Home
from protocol.statefile import StateFile
from supervisor.journal import Journal
from supervisor.platform import current_platform
from supervisor.store import ChildRecord, Desired, DesiredModel, Runtime, Store, remember_start
from tests.logkit import logged

DESIRED = Desired((DesiredModel("org/one", "/models/one", 1.5),), ("two",))
RUNTIME = Runtime(
    pid=4242,
    boot_id="boot",
    started_at=1.0,
    starts=(1.0, 2.0),
    incarnation=7,
    children=(ChildRecord("one-1a2b", "org/one", 7, 4243, 99.0),),
    loaded_models=("org/one",),
    snapshot={"schema": "lmx.status/1"},
)


class Disk:
    """The system, with a disk that can be filled: `refuses` holds the names of files it does not take."""

    def __init__(self) -> None:
        self.refuses: set[str] = set()
        self.synced = 0

    def full_sync(self, descriptor: int) -> None:
        self.synced += 1
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name if self.refuses else ""
        if name.removesuffix(".tmp") in self.refuses:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def home() -> Iterator[Home]:
    with tempfile.TemporaryDirectory(prefix="lmx-", dir="/tmp") as folder:  # pytest's own path is too long
        home = Home(Path(folder))
        home.ensure()
        yield home


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def store(home: Home, disk: Disk) -> Store:
    return Store(home, disk)  # type: ignore[arg-type]


def names(seen: list[dict[str, Any]]) -> list[str]:
    return [entry["event"] for entry in seen]


def test_an_empty_home_has_no_intent_and_an_unknown_past(home: Home) -> None:
    with logged() as seen:
        assert Store(home, current_platform()).load() == (None, Runtime())
    assert seen == []


def test_intent_and_past_survive_the_supervisor(home: Home) -> None:
    before = Store(home, current_platform())
    before.save_desired(DESIRED)
    before.save_runtime(RUNTIME)
    assert Store(home, current_platform()).load() == (DESIRED, RUNTIME)


def test_the_platforms_full_sync_is_what_makes_it_durable(store: Store, disk: Disk) -> None:
    store.save_desired(DESIRED)
    store.save_runtime(RUNTIME)
    assert disk.synced == 2


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="tells files apart by /proc")
def test_a_full_disk_is_said_once_and_again_when_it_is_over(store: Store, disk: Disk) -> None:
    assert (store.durable, store.problem) == (True, "")
    disk.refuses = {"desired", "runtime"}
    with logged() as seen:
        for _ in range(3):
            store.save_runtime(RUNTIME)
            store.save_desired(DESIRED)
    assert names(seen) == ["state_not_durable"]
    assert seen[0]["level"] == "ERROR"
    assert (store.durable, store.problem) == (False, "No space left on device")
    disk.refuses = set()
    with logged() as seen:
        for _ in range(3):
            store.save_runtime(RUNTIME)
            store.save_desired(DESIRED)
    assert names(seen) == ["state_durable_again"]
    assert (store.durable, store.problem) == (True, "")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="tells files apart by /proc")
def test_one_file_that_is_saved_does_not_hide_that_the_other_is_not(store: Store, disk: Disk) -> None:
    disk.refuses = {"desired"}
    with logged() as seen:
        for _ in range(3):
            store.save_desired(DESIRED)
            store.save_runtime(RUNTIME)
            assert not store.durable
    assert names(seen) == ["state_not_durable"]


def test_state_of_a_newer_version_is_not_durable_and_says_why(home: Home, store: Store) -> None:
    StateFile(home.state / "desired", kind="lmx.desired", schema=2).save({"models": []})
    with logged() as seen:
        assert store.load() == (None, Runtime())
        store.save_desired(DESIRED)
    assert names(seen) == ["state_recovered", "runtime_state_load_failed", "state_not_durable"]
    assert "newer version" in store.problem


def raw(file: Path, kind: str, payload: bytes) -> None:
    header = {"kind": kind, "schema": 1, "sequence": 1, "length": len(payload)}
    line = json.dumps({**header, "sha256": hashlib.sha256(payload).hexdigest()})
    file.write_bytes(line.encode() + b"\n" + payload)


@pytest.mark.parametrize(
    "payload",
    [
        [],
        "text",
        7,
        {"models": 1},
        {"models": [{"id": 1, "path": "/", "added_at": 0}]},
        {"models": [{"id": "x"}]},
        {"models": [[]], "unloaded": {}},
        {"unloaded": "abc", "pid": "x", "children": [None]},
    ],
)
def test_a_whole_file_of_the_wrong_shape_is_reported_and_not_taken(home: Home, store: Store, payload: object) -> None:
    for name in ("desired", "runtime"):
        raw(home.state / name, f"lmx.{name}", msgspec.json.encode(payload))
    with logged() as seen:
        desired, runtime = store.load()
    assert desired is None or (isinstance(payload, dict) and desired == Desired())
    assert isinstance(runtime, Runtime)
    failed = {entry["file"] for entry in seen if "another shape" in entry["reason"]}
    assert (desired is None) == ("desired" in failed)
    assert failed
    store.save_desired(DESIRED)
    assert store.load()[0] == DESIRED


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="tells files apart by /proc")
def test_what_the_disk_did_not_take_is_saved_once_it_can(home: Home, store: Store, disk: Disk) -> None:
    store.save_desired(Desired())
    disk.refuses = {"desired"}
    store.save_desired(DESIRED)
    store.try_again()
    assert not store.durable
    disk.refuses = set()
    with logged() as seen:
        store.try_again()
    assert (store.durable, names(seen)) == (True, ["state_durable_again"])
    assert Store(home, current_platform()).load()[0] == DESIRED
    synced = disk.synced
    store.try_again()
    assert disk.synced == synced, "nothing is written while nothing is missing"


@pytest.mark.parametrize("name", ["desired", "runtime"])
@pytest.mark.parametrize("payload", [[], 7, {"models": 1, "pid": "x"}, {"models": [{}], "children": [{"pid": 1}]}])
def test_a_whole_file_of_the_wrong_shape_gives_the_previous_one_and_says_so_in_the_journal(
    home: Home, name: str, payload: object
) -> None:
    journal = Journal(home.state / "events.jsonl")
    store = Store(home, current_platform(), journal.write)
    for number in (1, 2):  # the first of these becomes the previous one
        store.save_desired(Desired(unloaded=(f"model-{number}",)))
        store.save_runtime(Runtime(pid=number))
    raw(home.state / name, f"lmx.{name}", msgspec.json.encode(payload))
    desired, runtime = Store(home, current_platform(), journal.write).load()
    assert desired == Desired(unloaded=("model-1" if name == "desired" else "model-2",))
    assert runtime.pid == (1 if name == "runtime" else 2)
    (entry,) = lines(home.state / "events.jsonl")
    assert (entry["event"], entry["file"]) == ("state_recovered", name)
    assert entry["reason"].startswith(f"{name}: the contents have another shape: ")
    assert (home.state / f"{name}.bad").exists(), "kept aside for whoever wants to know"


@pytest.mark.parametrize("number", [-1, 2**53, 10**400])
def test_a_number_that_could_not_be_written_again_or_signalled_is_not_taken(home: Home, number: int) -> None:
    for field in ("incarnation", "pid"):
        raw(home.state / "runtime", "lmx.runtime", b'{"%s":%d}' % (field.encode(), number))
        store = Store(home, current_platform())
        with logged():
            _, runtime = store.load()
        assert runtime == Runtime()
        store.save_runtime(runtime)
        assert store.durable
    child = {"slot": "", "model": "", "incarnation": 1, "pid": 0, "started": 1.0}
    raw(home.state / "runtime", "lmx.runtime", json.dumps({"children": [child]}).encode())
    with logged():
        assert Store(home, current_platform()).load()[1].children == (), "pid 0 is our own process group"


def test_no_payload_with_a_good_checksum_raises_and_what_is_taken_can_be_saved_again(
    home: Home, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)  # a thousand of them are not what is tested
    chance = random.Random(20_260_102)
    whole = msgspec.json.encode(RUNTIME), msgspec.json.encode(DESIRED)
    values = [b"null", b"-1", b"[]", b"{}", b'"x"', b"1e400", b"9" * 400, b"true", b"[[1]]", b'"\\ud800"']
    taken = 0
    with logged() as seen:
        for _ in range(1_000):
            for name, payload in zip(("runtime", "desired"), whole, strict=True):
                found = [m.span() for m in re.finditer(rb'(?:"[^"]*"|[0-9.]+)(?!:)|[\[{]', payload)]
                start, end = chance.choice(found)
                raw(home.state / name, f"lmx.{name}", payload[:start] + chance.choice(values) + payload[end:])
            store = Store(home, disk)  # type: ignore[arg-type]
            desired, runtime = store.load()
            store.save_runtime(runtime)
            store.save_desired(desired or Desired())
            assert store.durable, store.problem
            taken += desired is not None
            for file in home.state.iterdir():
                file.unlink()
    assert "state_not_durable" not in names(seen)
    assert 0 < taken < 1_000


def test_unknown_fields_of_a_later_release_are_ignored(home: Home, store: Store) -> None:
    raw(home.state / "desired", "lmx.desired", b'{"models":[],"unloaded":["x"],"invented_later":{"a":1}}')
    assert store.load()[0] == Desired(unloaded=("x",))


def test_damage_is_reported_by_file_and_reason(home: Home, store: Store) -> None:
    store.save_desired(DESIRED)
    store.save_desired(Desired())
    (home.state / "desired").write_bytes(b"garbage \xff")
    with logged() as seen:
        assert store.load()[0] == DESIRED
    assert [(e["event"], e["file"], e["reason"]) for e in seen] == [
        ("state_recovered", "desired", "desired: the header cannot be read")
    ]


def test_recent_starts_are_kept_newest_last_and_bounded() -> None:
    starts: tuple[float, ...] = ()
    for now in range(100):
        starts = remember_start(starts, float(now))
    assert starts[-1] == 99.0
    assert len(starts) == 16
    assert list(starts) == sorted(starts)


# -- the journal ----------------------------------------------------------------------------------------------------


@pytest.fixture
def journal_file(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def test_each_event_is_one_line_in_order_and_is_also_logged(journal_file: Path) -> None:
    journal = Journal(journal_file)
    with logged() as seen:
        journal.write("process_started", model="one", pid=7)
        journal.write("hung", level="ERROR", reason="two\nlines", model=None)
    written = lines(journal_file)
    assert [(e["event"], e.get("pid"), e.get("reason")) for e in written] == [
        ("process_started", 7, None),
        ("hung", None, "two\nlines"),
    ]
    assert list(written[0])[:2] == ["ts", "event"]
    assert [(e["event"], e["level"]) for e in seen] == [("process_started", "INFO"), ("hung", "ERROR")]


def test_the_journal_is_turned_over_and_one_older_file_is_kept(
    journal_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supervisor.journal._MAX_BYTES", 1000)
    journal = Journal(journal_file)
    for number in range(100):
        journal.write("process_started", number=number)
    older = lines(journal_file.with_name("events.jsonl.1"))
    numbers = [entry["number"] for entry in (*older, *lines(journal_file))]
    assert numbers == list(range(numbers[0], 100))
    assert sum(file.stat().st_size for file in journal_file.parent.iterdir()) < 2500


@pytest.mark.parametrize("reason", ["\udc80 not UTF-8", "x" * 10_000_000, "{0} {reason} <red>"], ids=lambda r: r[:8])
def test_no_value_stops_the_journal(journal_file: Path, reason: str) -> None:
    Journal(journal_file).write("process_ended", reason=reason, ts=1, code=2**70)
    (entry,) = lines(journal_file)
    assert entry["event"] == "process_ended"
    assert entry["ts"] > 1_000_000_000
    assert entry["reason"].startswith(reason[:7].replace("\udc80", "\\udc80"))


def fails(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_does_not_stop_the_service_and_costs_only_that_line(
    journal_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(journal_file)
    journal.write("first")
    opened = Path.open

    def half(self: Path, mode: str = "r", **options: Any) -> Any:
        if self == journal_file and mode == "ab":
            with opened(self, "ab") as stream:
                stream.write(b'{"ts":1,"even')
            fails()
        return opened(self, mode, **options)

    with monkeypatch.context() as patch, logged() as seen:
        patch.setattr(Path, "open", half)
        journal.write("lost")
    assert "journal_not_written" in names(seen)
    journal.write("third")
    assert [line[:12] for line in journal_file.read_text().splitlines()].count('{"ts":1,"eve') == 1
    assert '"event":"third"' in journal_file.read_text().splitlines()[-1]
    assert json.loads(journal_file.read_text().splitlines()[-1])["event"] == "third"


@pytest.mark.parametrize(
    ("left", "whole"), [(b"", True), (b'{"a":1}\n', True), (b'{"a":1', False), (b'{"a":1}\n{"b', False)]
)
def test_a_line_that_a_dead_supervisor_left_unfinished_does_not_swallow_the_next(
    journal_file: Path, left: bytes, whole: bool
) -> None:
    journal_file.write_bytes(left)
    Journal(journal_file).write("next")
    text = journal_file.read_bytes()
    assert json.loads(text.splitlines()[-1])["event"] == "next"
    assert text.startswith(left + (b"{" if whole else b"\n{"))


def test_a_folder_that_is_gone_does_not_stop_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "gone" / "events.jsonl")
    with logged() as seen:
        journal.write("process_started")
    assert names(seen) == ["process_started", "journal_not_written"]


ACTIONS: tuple[tuple[str, Callable[[Store], None]], ...] = (
    ("desired", lambda store: store.save_desired(DESIRED)),
    ("runtime", lambda store: store.save_runtime(RUNTIME)),
)


@pytest.mark.parametrize(("name", "save"), ACTIONS, ids=[name for name, _ in ACTIONS])
def test_a_state_folder_that_is_gone_does_not_raise(
    home: Home, store: Store, name: str, save: Callable[[Store], None]
) -> None:
    home.state.rmdir()
    save(store)
    assert not store.durable
    assert store.problem == "No such file or directory"


def test_who_follows_the_journal_gets_each_entry_once_and_what_was_before_an_older_supervisor_wrote(
    journal_file: Path,
) -> None:
    journal_file.write_bytes(b'{"ts":1.5,"event":"old"}\n{"ts":2,"event":"older supervisor"}\nnot json\n{"ts":3')
    journal, heard = Journal(journal_file), list[bytes]()
    journal.write("first")
    with journal.followed(heard.append):
        journal.write("second")
    journal.write("third")
    assert [json.loads(entry)["event"] for entry in heard] == ["second"]
    recent = [json.loads(entry)["event"] for entry in journal.recent(1000, 0.0)]
    assert recent == ["old", "older supervisor", "first", "second", "third"]
    assert [json.loads(entry)["event"] for entry in journal.recent(2, 0.0)] == ["second", "third"]
    assert journal.recent(0, 0.0) == []
    assert len(journal.recent(1000, 2.0)) == 3
