"""State on disk survives every crash, a full disk and damage of any kind (design 9)."""

import errno
import hashlib
import os
import random
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.statefile import Loaded, StateFile

OLD = {"models": ["old"], "n": 1}
NEW = {"models": ["new", "newer"], "n": 2}
MUTATIONS = 10_000


class PowerLossError(BaseException):
    """Ends the save where it stands, as nothing but the end of the process would."""


def state(folder: Path, schema: int = 1, kind: str = "lmx.test") -> StateFile:
    # The name is looked up when it is called, so that a test can replace it.
    return StateFile(folder / "desired", kind=kind, schema=schema, sync=lambda fd: os.fsync(fd))  # noqa: PLW0108


def load(folder: Path, schema: int = 1) -> Loaded:
    """What a new process finds."""
    return state(folder, schema).load()


@pytest.fixture
def saved(tmp_path: Path) -> StateFile:
    """Live holds OLD, the previous one an older one."""
    file = state(tmp_path)
    file.save({"models": [], "n": 0})
    file.save(OLD)
    return file


# -- the ordinary way -----------------------------------------------------------------------------------------------


def test_what_was_saved_last_is_loaded(tmp_path: Path) -> None:
    file = state(tmp_path)
    assert load(tmp_path) == Loaded(None)
    for payload in (OLD, NEW, {}, [], "text", 0):
        file.save(payload)
        assert load(tmp_path) == Loaded(payload)
        assert file.peek() == payload


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=10,
    )
)
@settings(max_examples=50, deadline=None)
def test_any_document_comes_back_as_it_was(document: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        state(Path(folder)).save(document)
        assert load(Path(folder)).payload == document


def test_the_file_is_one_header_line_and_the_document(saved: StateFile, tmp_path: Path) -> None:
    line, _, body = (tmp_path / "desired").read_bytes().partition(b"\n")
    header = msgspec.json.decode(line)
    assert list(header) == ["kind", "schema", "sequence", "length", "sha256"]
    assert (header["kind"], header["schema"], header["sequence"]) == ("lmx.test", 1, 2)
    assert msgspec.json.decode(body) == OLD


def test_the_sequence_goes_on_after_a_restart(saved: StateFile, tmp_path: Path) -> None:
    again = state(tmp_path)
    again.load()
    again.save(NEW)
    assert msgspec.json.decode((tmp_path / "desired").read_bytes().partition(b"\n")[0])["sequence"] == 3


def test_only_this_user_can_read_state(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        file = state(tmp_path)
        file.save(OLD)
        file.save(NEW)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_what_is_written_is_synced_before_it_is_renamed_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    replace, fsync = Path.replace, os.fsync

    def renamed(self: Path, target: Path) -> Path:
        calls.append(f"{self.name} -> {target.name}")
        return replace(self, target)

    def synced(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync")
        fsync(descriptor)

    monkeypatch.setattr(Path, "replace", renamed)
    monkeypatch.setattr(os, "fsync", synced)
    file = StateFile(tmp_path / "desired", kind="lmx.test", schema=1, sync=lambda _fd: calls.append("full sync"))
    file.save(OLD)
    file.save(NEW)
    assert calls == [
        *("full sync", "desired.tmp -> desired", "folder"),
        *("full sync", "desired -> desired.prev", "desired.tmp -> desired", "folder"),
    ]


# -- crashes --------------------------------------------------------------------------------------------------------


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int, error: Callable[[], BaseException], *, after: bool) -> None:
    """Let the call number `at` of all that touch the disk fail, before or after it did its work."""
    count = 0

    def breaking(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == at and not after:
                raise error()
            result = real(*args, **kwargs)
            if count == at:
                raise error()
            return result

        return call

    for owner, name in ((os, "open"), (os, "write"), (os, "fsync"), (os, "close"), (Path, "replace")):
        monkeypatch.setattr(owner, name, breaking(getattr(owner, name)))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(1, 11))
def test_a_process_that_ends_at_any_step_of_a_save_leaves_the_old_or_the_new(
    saved: StateFile, tmp_path: Path, at: int, after: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupted(patch, at, PowerLossError, after=after)
        ended = False
        try:
            saved.save(NEW)
        except PowerLossError:
            ended = True
    assert ended == (at <= 9), "the table of crash points no longer covers every step"
    loaded = load(tmp_path)
    assert loaded.payload in (OLD, NEW)
    assert loaded.problems == ()
    again = state(tmp_path)
    again.load()
    again.save(NEW)
    assert load(tmp_path) == Loaded(NEW)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(1, 10))
def test_a_disk_error_at_any_step_is_an_oserror_and_the_next_save_heals(
    saved: StateFile, tmp_path: Path, at: int, after: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupted(patch, at, lambda: OSError(errno.EIO, "Input/output error"), after=after)
        with pytest.raises(OSError, match="Input/output error"):
            saved.save(NEW)
    assert load(tmp_path).payload in (OLD, NEW)
    saved.save(NEW)
    assert load(tmp_path) == Loaded(NEW)


@pytest.mark.parametrize("written", [0, 1, 10, 90, 150])
def test_a_write_that_stops_in_the_middle_leaves_the_old(
    saved: StateFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    write = os.write

    def part(descriptor: int, data: bytes) -> int:
        write(descriptor, data[:written])
        raise PowerLossError

    monkeypatch.setattr(os, "write", part)
    with pytest.raises(PowerLossError):
        saved.save(NEW)
    assert load(tmp_path) == Loaded(OLD)


def test_short_writes_are_completed(saved: StateFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    saved.save(NEW)
    assert load(tmp_path) == Loaded(NEW)


# -- full disks -----------------------------------------------------------------------------------------------------


def test_a_disk_that_takes_only_a_part_keeps_the_old(saved: StateFile, tmp_path: Path) -> None:
    program = """
import resource, sys
from pathlib import Path
from protocol.statefile import StateFile
resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
file = StateFile(Path(sys.argv[1]) / "desired", kind="lmx.test", schema=1)
file.load()
try:
    file.save({"models": ["x" * 1000]})
except OSError as error:
    sys.exit(0 if error.errno else 2)
sys.exit(1)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert load(tmp_path) == Loaded(OLD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["desired", "desired.prev"]


def test_a_full_disk_keeps_the_old_and_no_half_file(
    saved: StateFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, room = os.write, [20]

    def full(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken, room[0] = room[0], 0
        return write(descriptor, data[:taken])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        saved.save(NEW)
    assert load(tmp_path) == Loaded(OLD)
    assert not (tmp_path / "desired.tmp").exists()


def test_a_document_that_could_not_be_read_again_is_not_saved(saved: StateFile, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="could not be read again"):
        saved.save("x" * 16 * 1024 * 1024)
    assert load(tmp_path) == Loaded(OLD)
    biggest = "x" * (16 * 1024 * 1024 - 1024 - 2)
    saved.save(biggest)
    assert load(tmp_path).payload == biggest


def test_a_folder_that_is_gone_is_an_oserror(saved: StateFile, tmp_path: Path) -> None:
    for path in tmp_path.iterdir():
        path.unlink()
    tmp_path.rmdir()
    with pytest.raises(OSError, match="No such file"):
        saved.save(NEW)
    assert load(tmp_path) == Loaded(None)


# -- damage ---------------------------------------------------------------------------------------------------------


def put(folder: Path, live: bytes | None, previous: bytes | None) -> None:
    for name, data in (("desired", live), ("desired.prev", previous)):
        if data is None:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).write_bytes(data)


@pytest.fixture
def files(tmp_path: Path) -> tuple[bytes, bytes]:
    """Live (NEW) and previous (OLD)."""
    file = state(tmp_path)
    file.save(OLD)
    file.save(NEW)
    return (tmp_path / "desired").read_bytes(), (tmp_path / "desired.prev").read_bytes()


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where the system has such a place: tens of thousands of files are written there."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_a_live_file_cut_off_at_any_byte_gives_the_previous_one(files: tuple[bytes, bytes], tmp_path: Path) -> None:
    live, previous = files
    for length in range(len(live)):
        put(tmp_path, live[:length], previous)
        loaded = load(tmp_path)
        assert loaded.payload == OLD, length
        assert len(loaded.problems) == 1
        assert loaded.problems[0].startswith("desired: ")


def test_a_previous_file_cut_off_at_any_byte_does_not_matter_while_the_live_one_is_whole(
    files: tuple[bytes, bytes], tmp_path: Path
) -> None:
    live, previous = files
    for length in range(len(previous)):
        put(tmp_path, live, previous[:length])
        assert load(tmp_path) == Loaded(NEW)
        put(tmp_path, None, previous[:length])
        loaded = load(tmp_path)
        assert loaded.payload is None
        assert [problem.partition(":")[0] for problem in loaded.problems] == ["desired.prev"]


def test_damaged_files_are_kept_aside_and_the_next_save_works(files: tuple[bytes, bytes], tmp_path: Path) -> None:
    put(tmp_path, b"broken live", b"broken previous")
    file = state(tmp_path)
    loaded = file.load()
    assert loaded.payload is None
    assert loaded.problems == (
        "desired: the header cannot be read",
        "desired.prev: the header cannot be read",
    )
    assert (tmp_path / "desired.bad").read_bytes() == b"broken live"
    assert (tmp_path / "desired.prev.bad").read_bytes() == b"broken previous"
    file.save(NEW)
    assert load(tmp_path) == Loaded(NEW)
    assert (tmp_path / "desired.bad").exists()


def test_a_reader_that_does_not_own_the_file_moves_nothing(files: tuple[bytes, bytes], tmp_path: Path) -> None:
    put(tmp_path, b"broken", files[1])
    assert state(tmp_path).peek() == OLD
    put(tmp_path, b"broken", b"broken")
    assert state(tmp_path).peek() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["desired", "desired.prev"]


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Damage as disks, editors and scripts do it."""
    result = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(result) + 1)
        match chance.randrange(7):
            case 0 if result:
                result[at % len(result)] ^= 1 << chance.randrange(8)
            case 1:
                result[at:at] = chance.randbytes(chance.randint(1, 20))
            case 2:
                del result[at : at + chance.randint(1, 40)]
            case 3:
                result[at : at + 512] = bytes(min(512, len(result) - at))
            case 4:
                result += result[: chance.randint(0, 64)]
            case 5:
                result[at:at] = chance.choice([b"\n", b"{", b"[" * 2000, b'"', b"null", b"\xff\xfe", b"1e999"])
            case _:
                result = result[:at]
    return bytes(result)


def test_no_damage_raises_and_every_one_gives_the_old_the_new_or_nothing_with_a_problem_named(
    files: tuple[bytes, bytes], quick_folder: Path
) -> None:
    live, previous = files
    chance = random.Random(20_260_101)
    seen = {"old": 0, "new": 0, "none": 0}
    for number in range(MUTATIONS):
        which = chance.choice(("live", "previous", "both", "no live"))
        one = mutate(live, chance) if which in {"live", "both"} else None if which == "no live" else live
        two = mutate(previous, chance) if which in {"previous", "both", "no live"} else previous
        put(quick_folder, one, two)
        loaded = load(quick_folder)
        if loaded.payload == NEW:
            seen["new"] += 1
            assert one == live, number
        elif loaded.payload == OLD:
            seen["old"] += 1
            assert two == previous, number
            assert loaded.problems or one is None, number
        else:
            seen["none"] += 1
            assert loaded.payload is None, number
            assert loaded.problems, number
    assert min(seen.values()) > MUTATIONS / 10, seen


@pytest.mark.parametrize(
    "payload", [b"", b"not json", b"\xff\xff", b"[" * 100_000, b'{"a":', b"nan"], ids=lambda data: repr(data[:9])
)
def test_a_file_whose_checksum_fits_but_that_is_not_json_is_damaged(tmp_path: Path, payload: bytes) -> None:
    header = {
        "kind": "lmx.test", "schema": 1, "sequence": 9, "length": len(payload),
        "sha256": hashlib.sha256(payload).hexdigest(),
    }  # fmt: skip
    put(tmp_path, msgspec.json.encode(header) + b"\n" + payload, None)
    loaded = load(tmp_path)
    assert loaded == Loaded(None, ("desired: the contents are not JSON",))


def test_a_file_of_another_kind_is_not_taken(tmp_path: Path) -> None:
    StateFile(tmp_path / "desired", kind="lmx.other", schema=1).save(NEW)
    loaded = load(tmp_path)
    assert loaded.payload is None
    assert "lmx.other" in loaded.problems[0]


def test_something_that_is_no_file_is_a_problem_and_no_exception(tmp_path: Path) -> None:
    (tmp_path / "desired").mkdir()
    file = state(tmp_path)
    assert "desired: " in file.load().problems[0]
    file.save(NEW)
    assert load(tmp_path) == Loaded(NEW)


# -- versions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["desired", "desired.prev"])
def test_a_newer_schema_is_left_alone_and_never_overwritten(tmp_path: Path, name: str) -> None:
    state(tmp_path, schema=2).save(NEW)
    (tmp_path / "desired").rename(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    file = state(tmp_path, schema=1)
    loaded = file.load()
    assert loaded.payload is None
    assert "schema 2" in loaded.problems[0]
    assert file.peek() is None
    with pytest.raises(OSError, match="written by a newer version and is left as it is"):
        file.save(OLD)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == before


def test_an_older_schema_is_read(tmp_path: Path) -> None:
    state(tmp_path, schema=1).save(OLD)
    assert load(tmp_path, schema=2) == Loaded(OLD)
