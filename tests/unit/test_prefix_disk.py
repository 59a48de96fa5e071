"""Prefixes on disk: what is written comes back, and nothing else does."""

import os
import resource
import signal
import stat
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from worker import prefix_disk, prefix_shelf
from worker.prefix_disk import Loaded, PrefixDisk
from worker.prefix_file import BadBlockError, path_of, read_block, write_block
from worker.prefix_shelf import Shelf

BINDING = b"b" * 32
OTHER = b"o" * 32
PAYLOAD = bytes(range(256)) * 64


def name(number: int) -> bytes:
    return number.to_bytes(24, "big")


@pytest.fixture
def open_disk(tmp_path: Path) -> Iterator[Callable[..., PrefixDisk]]:
    made: list[PrefixDisk] = []

    def make(limit: int = 10**9, binding: bytes = BINDING, slot: str = "slot") -> PrefixDisk:
        made.append(PrefixDisk(Shelf(tmp_path / "cache", slot, binding, limit), binding, len(PAYLOAD)))
        return made[-1]

    yield make
    for disk in made:
        disk.close(5)


def save(disk: PrefixDisk, *numbers: int, depth: int | None = None) -> None:
    for number in numbers:
        assert disk.save(name(number), number if depth is None else depth, [memoryview(PAYLOAD)], None, len(PAYLOAD))
    settle(disk)


def settle(disk: PrefixDisk) -> None:
    until = time.monotonic() + 20
    while disk.waiting and time.monotonic() < until:
        disk.poll(0.005)
    assert not disk.waiting


def load(disk: PrefixDisk, *numbers: int) -> list[Loaded]:
    ticket = disk.load([name(number) for number in numbers])
    found: list[Loaded] = []
    while not (found and found[-1].last):
        loaded = disk.poll(20.0)
        assert loaded is not None
        assert loaded.ticket == ticket
        found.append(loaded)
    return found


def files(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.glob("cache/*/*/*"))


def test_a_block_comes_back_also_in_another_process(open_disk: Callable[..., PrefixDisk], tmp_path: Path) -> None:
    disk = open_disk()
    save(disk, 1, 2, 3)
    assert all(name(number) in disk for number in (1, 2, 3))
    again = open_disk()
    assert name(2) in again
    assert [bytes(one.payload or b"") for one in load(again, 1, 2, 3)] == [PAYLOAD] * 3
    for path in (*files(tmp_path), tmp_path / "cache"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


@pytest.mark.parametrize(
    "change",
    ["truncated", "emptied", "flipped", "header", "foreign", "renamed", "long", "larger", "pipe", "link", "folder"],
)
def test_a_file_that_is_not_what_it_should_be_is_removed_and_not_used(
    open_disk: Callable[..., PrefixDisk], tmp_path: Path, change: str
) -> None:
    disk = open_disk()
    save(disk, 1, 2, 3)
    file = path_of(files(tmp_path)[0].parent, name(2))
    data = bytearray(file.read_bytes())
    if change == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif change == "emptied":
        file.write_bytes(b"")
    elif change == "flipped":
        data[-100] ^= 1
        file.write_bytes(data)
    elif change == "header":
        data[20] ^= 0xFF
        file.write_bytes(data)
    elif change == "foreign":
        write_block(file.parent, OTHER, name(2), [memoryview(PAYLOAD)])
    elif change == "renamed":
        write_block(file.parent, BINDING, name(9), [memoryview(PAYLOAD)])
        path_of(file.parent, name(9)).replace(file)
    elif change == "larger":
        file.unlink()
        write_block(file.parent, BINDING, name(2), [memoryview(PAYLOAD), memoryview(PAYLOAD)])
    elif change in {"pipe", "link", "folder"}:
        file.unlink()
        if change == "pipe":
            os.mkfifo(file)
        elif change == "link":
            file.symlink_to("/dev/zero")
        else:
            (file / "deep").mkdir(parents=True)
    else:
        file.write_bytes(data + b"x")
    found = load(disk, 1, 2, 3)
    assert [one.payload is not None for one in found] == [True, False], "what follows is of no use without it"
    assert not file.exists()
    assert name(2) not in disk
    with pytest.raises(OSError, match="No such file"):
        read_block(file.parent, BINDING, name(2), len(PAYLOAD))
    save(disk, 2)
    assert len(load(disk, 1, 2, 3)) == 3, "it is written anew"


def test_a_file_that_is_gone_is_a_miss(open_disk: Callable[..., PrefixDisk], tmp_path: Path) -> None:
    disk = open_disk()
    save(disk, 1)
    files(tmp_path)[0].unlink()
    assert [one.payload for one in load(disk, 1)] == [None]
    assert name(1) not in disk


def test_what_another_model_left_in_this_place_goes(open_disk: Callable[..., PrefixDisk], tmp_path: Path) -> None:
    save(open_disk(binding=OTHER), 1)
    save(open_disk(slot="neighbour"), 2)
    disk = open_disk()
    assert name(1) not in disk
    assert [file.parent.parent.name for file in files(tmp_path)] == ["neighbour"]


def test_the_bytes_of_all_models_stay_below_the_limit_and_the_least_recently_used_go(
    open_disk: Callable[..., PrefixDisk], tmp_path: Path
) -> None:
    limit = 10 * len(PAYLOAD)
    neighbour = open_disk(limit, slot="neighbour")
    save(neighbour, 1, 2, 3)
    long_ago = time.time() - 1000
    for file in files(tmp_path):
        os.utime(file, (long_ago, long_ago))
    disk = open_disk(limit)
    for number in range(10, 40):
        save(disk, number)
        assert sum(file.stat().st_size for file in files(tmp_path)) <= limit
    left = [file.parent.parent.name for file in files(tmp_path)]
    assert "neighbour" not in left
    assert name(39) in disk
    assert name(10) not in disk
    assert [one.payload for one in load(neighbour, 1)] == [None]


def test_of_one_sequence_the_end_goes_first_however_slow_the_disk_is(
    open_disk: Callable[..., PrefixDisk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utime = os.utime
    monkeypatch.setattr(os, "utime", lambda *args, **more: (time.sleep(0.005), utime(*args, **more)))
    disk = open_disk(11 * len(PAYLOAD))
    save(disk, *range(8))
    disk.touch([(name(number), number) for number in range(8)])
    save(disk, *range(1000, 1004), depth=0)
    left = {file.name for file in files(tmp_path)}
    kept = [path_of(tmp_path, name(number)).name in left for number in range(8)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0]
    assert not kept[-1]


def test_a_disk_that_takes_nothing_is_left_alone_and_the_rest_goes_on(
    open_disk: Callable[..., PrefixDisk], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disk = open_disk()
    save(disk, 1)
    tries: list[int] = []

    def full(*_: object) -> int:
        tries.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prefix_disk, "write_block", full)
    save(disk, 2, 3, 4)
    assert len(tries) == 1, "one try a minute"
    assert name(2) not in disk
    assert load(disk, 1)[0].payload is not None


def test_a_write_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        write_block(tmp_path, BINDING, name(1), [memoryview(PAYLOAD)])
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:1000]))
    write_block(tmp_path, BINDING, name(1), [memoryview(PAYLOAD), memoryview(PAYLOAD)])
    assert bytes(read_block(tmp_path, BINDING, name(1), 2 * len(PAYLOAD))) == PAYLOAD * 2


def test_temporary_files_of_the_dead_are_swept(open_disk: Callable[..., PrefixDisk], tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "slot" / BINDING.hex()[:32]
    folder.mkdir(parents=True)
    stale = folder / f"{name(1).hex()}.1.tmp"
    stale.write_bytes(PAYLOAD)
    old = time.time() - 10 * prefix_shelf._STALE_S
    os.utime(stale, (old, old))
    save(open_disk(), 2)
    assert [file.suffix for file in files(tmp_path)] == [".kv"]


def test_what_a_failed_engine_wrote_is_removed_and_what_was_there_before_stays(
    open_disk: Callable[..., PrefixDisk], tmp_path: Path
) -> None:
    save(open_disk(), 1)
    disk = open_disk()
    save(disk, 2, 3)
    disk.disown()
    assert [file.stem for file in files(tmp_path)] == [name(1).hex()]


def test_what_was_being_written_when_the_engine_failed_does_not_stay_either(
    open_disk: Callable[..., PrefixDisk], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun, over = threading.Event(), threading.Event()

    def held_up(folder: Path, binding: bytes, name: bytes, payload: list[memoryview]) -> int:
        begun.set()
        over.wait(60)
        return write_block(folder, binding, name, payload)

    monkeypatch.setattr(prefix_disk, "write_block", held_up)
    monkeypatch.setattr(prefix_disk, "_DISOWN_S", 0.0)
    disk = open_disk()
    assert disk.save(name(1), 0, [memoryview(PAYLOAD)], None, len(PAYLOAD))
    begun.wait(60)
    disk.disown()
    over.set()
    disk._thread.join(60)
    assert files(tmp_path) == []


def test_no_more_waits_to_be_written_than_so_many_bytes(
    open_disk: Callable[..., PrefixDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_disk, "_MAX_WAITING_BYTES", 2 * len(PAYLOAD))
    disk = open_disk()
    with disk._condition:  # the thread waits
        taken = [disk.save(name(n), n, [memoryview(PAYLOAD)], None, len(PAYLOAD)) for n in range(2)]
    assert taken == [True, True]
    with disk._condition:
        disk._waiting[name(5)] = prefix_disk._Waiting(2 * len(PAYLOAD), None)
    assert not disk.save(name(9), 9, [memoryview(PAYLOAD)], None, len(PAYLOAD))
    del disk._waiting[name(5)]


def test_a_file_of_gigabytes_is_not_read(open_disk: Callable[..., PrefixDisk], tmp_path: Path) -> None:
    disk = open_disk()
    save(disk, 1)
    (file,) = files(tmp_path)
    with file.open("r+b") as stream:
        stream.truncate(8 * 1024**3)
    before = peak_bytes()
    assert load(disk, 1)[0].payload is None
    assert peak_bytes() - before < 256 * 1024**2


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_no_more_is_read_ahead_than_so_many_bytes_until_it_is_taken(
    open_disk: Callable[..., PrefixDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[bytes] = []
    read = prefix_disk.read_block

    def counted(folder: Path, binding: bytes, name: bytes, size: int) -> memoryview:
        reads.append(name)
        return read(folder, binding, name, size)

    monkeypatch.setattr(prefix_disk, "_MAX_UNREAD_BYTES", 3 * len(PAYLOAD))
    monkeypatch.setattr(prefix_disk, "read_block", counted)
    disk = open_disk()
    save(disk, *range(20))
    first, second = disk.load([name(n) for n in range(10)]), disk.load([name(n) for n in range(10, 20)])
    wait_until(lambda: len(reads) == 3)
    # Nobody takes anything: what was not asked for any more is not read, and writing goes on.
    disk.forget(first)
    disk.forget(second)
    save(disk, 50)
    assert len(reads) == 3
    # What is taken makes room for the rest.
    found = load(disk, *range(20))
    assert [one.payload is not None for one in found] == [True] * 20
    assert disk._unread == 0
    assert not disk._wanted


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_disk_that_is_closed_while_nobody_takes_what_it_read_ends_at_once(
    open_disk: Callable[..., PrefixDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_disk, "_MAX_UNREAD_BYTES", len(PAYLOAD))
    disk = open_disk()
    save(disk, *range(5))
    disk.load([name(n) for n in range(5)])
    wait_until(lambda: disk._unread > 0)
    disk.close(20)
    assert not disk._thread.is_alive()


def test_the_bytes_stay_below_the_limit_while_several_models_write(
    open_disk: Callable[..., PrefixDisk], tmp_path: Path
) -> None:
    limit = 64 * len(PAYLOAD)
    disks = [open_disk(limit, slot=f"model{number}") for number in range(3)]
    for number in range(150):
        save(disks[number % 3], number)
        assert sum(file.stat().st_size for file in files(tmp_path)) <= limit
    assert {file.parent.parent.name for file in files(tmp_path)} == {"model0", "model1", "model2"}
    assert len(files(tmp_path)) > 32, "the limit is used"


def test_a_bad_block_is_told_without_its_content(tmp_path: Path) -> None:
    path_of(tmp_path, name(1)).write_bytes(b"secret words of a prompt")
    with pytest.raises(BadBlockError) as raised:
        read_block(tmp_path, BINDING, name(1), len(PAYLOAD))
    assert "secret" not in str(raised.value)


def test_a_disk_whose_thread_ended_is_not_asked(
    open_disk: Callable[..., PrefixDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = open_disk()
    save(disk, 1)

    def broken(*_: object) -> memoryview:
        raise ValueError("a bug")

    monkeypatch.setattr(prefix_disk, "read_block", broken)
    assert disk.load([name(1)])
    disk._thread.join(20)
    assert disk.load([name(1)]) == 0
    assert not disk.save(name(2), 0, [memoryview(PAYLOAD)], None, len(PAYLOAD))


def test_a_signal_while_the_disk_is_waited_for_does_not_make_the_wait_endless(
    open_disk: Callable[..., PrefixDisk],
) -> None:
    disk = open_disk()
    wait_until(lambda: disk.poll() is None)
    disk.touch([])
    over, main = threading.Event(), threading.get_ident()

    def disturb() -> None:
        while not over.wait(0.003):
            signal.pthread_kill(main, signal.SIGUSR2)

    def rescue() -> None:
        if not over.wait(30):
            disk._results.put(Loaded(0, b"", None, last=True))

    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    threads = [threading.Thread(target=target) for target in (disturb, rescue)]
    try:
        for thread in threads:
            thread.start()
        found = [disk.poll(0.004) for _ in range(250)]
    finally:
        over.set()
        for thread in threads:
            thread.join()
        signal.signal(signal.SIGUSR2, before)
    assert found == [None] * 250, "somebody had to end it"


def test_the_main_thread_is_the_last_to_hold_what_was_written(open_disk: Callable[..., PrefixDisk]) -> None:
    """It owns the arrays behind it, and frees them."""

    class Owner:
        pass

    disk, owner = open_disk(), Owner()
    gone = weakref.ref(owner)
    assert disk.save(name(1), 0, [memoryview(PAYLOAD)], owner, len(PAYLOAD))
    del owner
    disk.close(20)
    assert gone() is not None
    settle(disk)
    assert gone() is None


def test_what_is_known_of_files_does_not_outgrow_them(open_disk: Callable[..., PrefixDisk], tmp_path: Path) -> None:
    disk = open_disk(10 * len(PAYLOAD))
    for number in range(40):
        save(disk, number)
    settle(disk)
    assert disk._names == disk._ours
    assert len(disk._names) == len(files(tmp_path)) <= 10
