"""What the supervisor asks of the system: Linux for real, macOS on constructed samples (design 12)."""

import asyncio
import contextlib
import ctypes
import os
import platform
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from supervisor.platform import blas, current_platform, darwin
from supervisor.platform.base import Pressure
from supervisor.platform.blas import find_blas
from supervisor.platform.darwin import RUSAGE_V0_BYTES, Darwin, KqueueWatch, footprint_of, uid_of
from supervisor.platform.linux import Linux

MIB = 1024 * 1024
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="asks a Linux kernel")


class Program:
    """A Python process that runs one line of ours at a time and answers with an empty one."""

    def __init__(self) -> None:
        loop = "import sys\nfor line in sys.stdin:\n    exec(line)\n    print(flush=True)"
        command = [sys.executable, "-c", loop]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        self.do("pass")

    def do(self, line: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        self.process.stdout.readline()

    def become_zombie(self) -> None:
        """End it without taking its exit status."""
        self.process.kill()
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def program() -> Iterator[Program]:
    program = Program()
    yield program
    program.end()


@pytest.fixture
def orphan() -> Iterator[int]:
    """The pid of a process that is not our child."""
    command = ["sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!"]
    pid = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout)
    yield pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


# -- Linux, for real ------------------------------------------------------------------------------------------------


@on_linux
def test_this_machine_has_its_side() -> None:
    assert isinstance(current_platform(), Linux)


@on_linux
def test_a_boot_has_one_id() -> None:
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", Linux().boot_id())
    assert Linux().boot_id() == Linux().boot_id()


@on_linux
def test_the_start_of_a_process_does_not_change_and_tells_processes_apart(program: Program) -> None:
    first = Linux().process_started(program.pid)
    assert first is not None
    assert Linux().process_started(program.pid) == first
    mine = Linux().process_started(os.getpid())
    assert mine is not None
    assert mine < first


@on_linux
def test_a_zombie_a_dead_process_and_no_process_have_no_start(program: Program) -> None:
    program.become_zombie()
    assert Linux().process_started(program.pid) is None
    program.end()
    assert Linux().process_started(program.pid) is None
    for pid in (dead_pid(), 0, -1, 2**31 - 1):
        assert Linux().process_started(pid) is None


@on_linux
def test_a_process_named_to_confuse_a_parser_has_its_start(tmp_path: Path) -> None:
    sleep = shutil.which("sleep")
    assert sleep is not None
    odd = tmp_path / "x) Z 1 (\n) R"
    shutil.copy(sleep, odd)
    with subprocess.Popen([odd, "60"], executable=odd) as process:
        try:
            for _ in range(1000):
                if Path(f"/proc/{process.pid}/comm").read_text().startswith("x)"):
                    break
                time.sleep(0.005)
            ticks = os.sysconf("SC_CLK_TCK")
            started = Linux().process_started(process.pid)
            assert started is not None
            uptime = float(Path("/proc/uptime").read_text().split()[0])
            assert uptime - started / ticks < 60
        finally:
            process.kill()


async def ended(watch: Callable[[Callable[[], None]], Any], kill: Callable[[], object]) -> int:
    """Return how often a watch has called after the process ended."""
    calls = 0
    called = asyncio.Event()

    def gone() -> None:
        nonlocal calls
        calls += 1
        called.set()

    watch(gone)
    await asyncio.sleep(0)
    assert calls == 0
    kill()
    async with asyncio.timeout(10):
        await called.wait()
    await asyncio.sleep(0.02)
    return calls


@on_linux
async def test_the_end_of_a_child_is_told_once(program: Program) -> None:
    loop = asyncio.get_running_loop()
    assert await ended(lambda gone: Linux().watch_exit(loop, program.pid, gone), program.process.kill) == 1


@on_linux
async def test_the_end_of_a_process_that_is_not_our_child_is_told_once(orphan: int) -> None:
    loop = asyncio.get_running_loop()
    kill = lambda: os.kill(orphan, signal.SIGKILL)  # noqa: E731
    assert await ended(lambda gone: Linux().watch_exit(loop, orphan, gone), kill) == 1


@on_linux
async def test_a_child_that_has_already_ended_but_was_not_waited_for_is_told(program: Program) -> None:
    program.become_zombie()
    loop = asyncio.get_running_loop()
    assert await ended(lambda gone: Linux().watch_exit(loop, program.pid, gone), lambda: None) == 1


@on_linux
async def test_no_process_cannot_be_watched() -> None:
    with pytest.raises(ProcessLookupError):
        Linux().watch_exit(asyncio.get_running_loop(), dead_pid(), lambda: None)


def pidfds() -> int:
    """Count the descriptors of this kind: of files, other threads may open and close some at any moment."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += "pidfd" in os.readlink(entry)  # noqa: PTH115 - it names no file
    return found


@on_linux
async def test_a_watch_that_was_closed_says_nothing_and_holds_no_descriptor(program: Program) -> None:
    before = pidfds()
    told: list[bool] = []
    watch = Linux().watch_exit(asyncio.get_running_loop(), program.pid, lambda: told.append(True))
    assert pidfds() == before + 1
    watch.close()
    watch.close()
    assert pidfds() == before
    program.end()
    await asyncio.sleep(0.02)
    assert told == []


@on_linux
def test_the_footprint_grows_with_what_is_held_and_shrinks_again(program: Program) -> None:
    before = Linux().footprint(program.pid)
    assert before is not None
    assert MIB < before < 200 * MIB
    program.do("ballast = bytearray(64 * 1024 * 1024); ballast[::4096] = bytes(len(ballast) // 4096)")
    with_ballast = Linux().footprint(program.pid)
    assert with_ballast is not None
    assert 60 * MIB < with_ballast - before < 80 * MIB
    program.do("del ballast")
    after = Linux().footprint(program.pid)
    assert after is not None
    assert after - before < 10 * MIB


@on_linux
def test_the_footprint_of_what_is_gone_is_unknown_and_not_zero(program: Program) -> None:
    assert Linux().footprint(dead_pid()) is None
    program.become_zombie()
    assert Linux().footprint(program.pid) is None


@on_linux
def test_looking_at_memory_is_cheap_enough_for_four_times_a_second() -> None:
    """It is done on the event loop: less than 2 ms each at the best of five, with 300 MB held."""
    ballast = bytearray(300 * MIB)
    ballast[::4096] = bytes(len(ballast) // 4096)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        assert Linux().footprint(os.getpid()) is not None
        best = min(best, time.perf_counter() - start)
    assert best < 0.002
    assert len(ballast) == 300 * MIB


@on_linux
def test_the_machine_says_what_it_has_and_how_short_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    total, available = Linux().total(), Linux().available()
    assert total is not None
    assert available is not None
    assert 0 < available < total
    assert Linux().gpu_limit() is None

    def stalls(some: float, full: float) -> Pressure | None:
        text = f"some avg10={some:.2f} avg60=0.00 avg300=0.00 total=5\nfull avg10={full:.2f} avg60=9.00 total=5\n"
        monkeypatch.setattr(Path, "read_bytes", lambda _path: text.encode())
        return Linux().pressure()

    assert stalls(0, 0) is Pressure.NORMAL
    assert stalls(19.99, 10) is Pressure.NORMAL
    assert stalls(20, 10) is Pressure.WARNING
    assert stalls(90, 40) is Pressure.CRITICAL

    def refuse(_path: Path) -> bytes:
        raise PermissionError

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert Linux().pressure() is None
    assert Linux().available() is None
    assert Linux().total() is None
    assert Linux().footprint(os.getpid()) is None


@on_linux
def test_a_peer_is_known_by_uid_and_pid(tmp_path: Path, program: Program) -> None:
    one, two = socket.socketpair()
    with one, two:
        assert Linux().peer(one) == (os.getuid(), os.getpid())
    path = f"/tmp/lmx-peer-{os.getpid()}.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        program.do(f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({path!r})")
        sock, _ = listener.accept()
        with sock:
            assert Linux().peer(sock) == (os.getuid(), program.pid)
            program.end()
            assert Linux().peer(sock)[0] == os.getuid()
    Path(path).unlink()


@on_linux
def test_a_full_sync_works_on_a_file(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as stream:
        stream.write(b"data")
        Linux().full_sync(stream.fileno())
    with pytest.raises(OSError, match="Bad file descriptor"):
        Linux().full_sync(stream.fileno() if not stream.closed else 10**6)


# -- macOS, on samples ----------------------------------------------------------------------------------------------


def rusage(footprint: int) -> bytes:
    """`struct rusage_info_v0`: uuid, 2 times, 2 wakeups, pageins, wired, resident, footprint, 2 times."""
    fields = (111, 222, 3, 4, 5, 6 * MIB, 700 * MIB, footprint, 888, 0)
    return struct.pack("<16s10Q", bytes(range(16)), *fields)


def xucred(version: int, uid: int) -> bytes:
    """`struct xucred`: version, uid, number of groups (16 bits, padded), 16 groups."""
    return struct.pack("<IIhxx16I", version, uid, 2, 20, 12, *[0] * 14)


class Libc:
    """The two calls of macOS's C library, for one living process with pid 42."""

    def __init__(
        self, boot: bytes | None = b"0F1E2D3C-1111-2222-3333-444455556666", numbers: dict[bytes, bytes] | None = None
    ) -> None:
        self.boot = boot
        self.numbers = numbers or {}

    def sysctlbyname(self, name: bytes, value: Any, size: Any, new: None, length: int) -> int:
        if name != b"kern.bootsessionuuid":
            if name not in self.numbers:
                return -1
            ctypes.memmove(value, self.numbers[name], len(self.numbers[name]))
            size._obj.value = len(self.numbers[name])
            return 0
        assert (name, new, length) == (b"kern.bootsessionuuid", None, 0)
        if self.boot is None:
            return -1
        ctypes.memmove(value, self.boot + b"\0", len(self.boot) + 1)
        return 0

    def proc_pid_rusage(self, pid: int, flavor: int, buffer: Any) -> int:
        assert flavor == 0
        if pid != 42:
            return -1
        ctypes.memmove(buffer, rusage(123_456_789_012), RUSAGE_V0_BYTES)
        return 0


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Darwin:
    machine = Darwin()
    monkeypatch.setattr(machine, "_libc", Libc())
    return machine


def test_the_structures_have_the_sizes_of_the_headers() -> None:
    assert len(rusage(0)) == RUSAGE_V0_BYTES == 96
    assert len(xucred(0, 0)) == darwin._XUCRED_BYTES == 76


@pytest.mark.parametrize("footprint", [0, 1, 123_456_789_012, 2**64 - 1])
def test_the_footprint_is_the_physical_one_and_not_the_resident(footprint: int) -> None:
    assert footprint_of(rusage(footprint)) == footprint


@pytest.mark.parametrize("uid", [0, 501, 2**32 - 2])
def test_the_peer_is_the_uid_of_its_credentials(uid: int) -> None:
    assert uid_of(xucred(0, uid)) == uid


@pytest.mark.parametrize("data", [xucred(1, 501), b"", b"\0" * 7], ids=["version", "empty", "short"])
def test_credentials_of_an_unknown_form_are_nobodys(data: bytes) -> None:
    with pytest.raises(PermissionError, match="unknown form"):
        uid_of(data)


def test_the_mac_side_asks_for_what_it_parses(mac: Darwin, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mac.boot_id() == "0F1E2D3C-1111-2222-3333-444455556666"
    assert mac.footprint(42) == 123_456_789_012
    assert mac.footprint(43) is None
    assert mac.preload(Path("/nonexistent")) is None
    monkeypatch.setattr(mac, "_libc", Libc(boot=None))
    assert re.fullmatch(r"boot-\d+", mac.boot_id())


@pytest.mark.parametrize(
    ("total_gib", "limit_mb", "expected"),
    [(16, 0, 16 * 1024**3 * 2 // 3), (64, 0, 48 * 1024**3), (64, 57344, 57344 * 1024**2)],
)
def test_the_mac_side_knows_the_machine(
    mac: Darwin, monkeypatch: pytest.MonkeyPatch, total_gib: int, limit_mb: int, expected: int
) -> None:
    numbers = {
        b"hw.memsize": struct.pack("<Q", total_gib * 1024**3),
        b"iogpu.wired_limit_mb": struct.pack("<I", limit_mb),
        b"kern.memorystatus_vm_pressure_level": struct.pack("<I", 4),
    }
    monkeypatch.setattr(mac, "_libc", Libc(numbers=numbers))
    assert mac.total() == total_gib * 1024**3
    assert mac.gpu_limit() == expected
    assert mac.pressure() is Pressure.CRITICAL
    numbers[b"kern.memorystatus_vm_pressure_level"] = struct.pack("<I", 3)
    assert mac.pressure() is None
    numbers.clear()
    assert (mac.total(), mac.gpu_limit(), mac.pressure()) == (None, None, None)


def test_the_mac_side_asks_the_socket_for_uid_and_pid(mac: Darwin) -> None:
    class Sock:
        def getsockopt(self, level: int, option: int, size: int = 0) -> bytes | int:
            return {(0, 1, 76): xucred(0, 501), (0, 2, 0): 4242}[(level, option, size)]

    sock: Any = Sock()
    assert mac.peer(sock) == (501, 4242)


def test_the_mac_side_knows_zombies_and_the_dead(mac: Darwin, program: Program) -> None:
    started = mac.process_started(program.pid)
    assert started is not None
    assert abs(started - time.time()) < 600
    program.become_zombie()
    assert mac.process_started(program.pid) is None
    assert mac.process_started(dead_pid()) is None


def test_a_volume_without_full_sync_gets_a_plain_one(
    mac: Darwin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[object] = []

    def refused(descriptor: int, operation: int) -> int:
        calls.append(operation)
        raise OSError(45, "Operation not supported")

    monkeypatch.setattr(darwin.fcntl, "fcntl", refused)
    monkeypatch.setattr(darwin.os, "fsync", lambda _fd: calls.append("fsync"))
    mac.full_sync(7)
    assert calls == [51, "fsync"]
    calls.clear()
    monkeypatch.setattr(darwin.fcntl, "fcntl", lambda _fd, operation: calls.append(operation))
    mac.full_sync(7)
    assert calls == [51]


class Kqueue:
    """The part of `select` that only macOS has. Its queue is a pipe, readable once `fire` was called."""

    KQ_FILTER_PROC, KQ_EV_ADD, KQ_EV_ONESHOT, KQ_NOTE_EXIT = -5, 1, 16, 0x80000000

    def __init__(self) -> None:
        self.read, self.write = os.pipe()
        self.closed = False
        self.asked: list[Any] = []
        self.living = True

    def kqueue(self) -> "Kqueue":
        return self

    def kevent(self, *wanted: Any) -> Any:
        return wanted

    def control(self, changes: list[Any], limit: int, wait: int) -> None:
        self.asked += changes
        if not self.living:
            raise ProcessLookupError(3, "No such process")

    def fileno(self) -> int:
        return self.read

    def fire(self) -> None:
        os.write(self.write, b"x")

    def close(self) -> None:
        if not self.closed:
            os.close(self.read)
            os.close(self.write)
        self.closed = True


@pytest.fixture
def kqueue(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kqueue]:
    queue = Kqueue()
    monkeypatch.setattr(darwin, "select", queue)
    yield queue
    queue.close()


async def test_the_mac_side_watches_through_a_kqueue(kqueue: Kqueue, mac: Darwin) -> None:
    loop = asyncio.get_running_loop()
    assert await ended(lambda gone: mac.watch_exit(loop, 42, gone), kqueue.fire) == 1
    assert kqueue.asked == [(42, -5, 1 | 16, 0x80000000)]
    assert kqueue.closed


async def test_a_kqueue_watch_that_was_closed_or_refused_holds_nothing(kqueue: Kqueue) -> None:
    watch = KqueueWatch(asyncio.get_running_loop(), 42, lambda: None)
    watch.close()
    watch.close()
    assert kqueue.closed


async def test_a_process_that_has_ended_cannot_be_watched_on_a_mac(kqueue: Kqueue) -> None:
    kqueue.living = False
    with pytest.raises(ProcessLookupError):
        KqueueWatch(asyncio.get_running_loop(), 42, lambda: None)
    assert kqueue.closed


# -- the matrix library ---------------------------------------------------------------------------------------------

SGEMM = """
void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc) { BODY }
"""
MULTIPLY = """
for (int i = 0; i < m; i++) for (int j = 0; j < n; j++) {
    float sum = 0; for (int l = 0; l < k; l++) sum += a[i * lda + l] * b[l * ldb + j];
    c[i * ldc + j] = alpha * sum;
}
"""
BROKEN = {
    "computes nothing": SGEMM.replace("BODY", ""),
    "computes wrongly": SGEMM.replace("BODY", MULTIPLY.replace("alpha * sum", "alpha * sum * 1.0001f")),
    "ends the process when it is loaded": "#include <stdlib.h>\n"
    + SGEMM.replace("BODY", MULTIPLY)
    + "__attribute__((constructor)) static void start(void) { abort(); }",
    "uses an instruction that this processor lacks": SGEMM.replace("BODY", "__builtin_trap();"),
    "never ends": SGEMM.replace("BODY", "for (;;) ((volatile float *)c)[0] = 0;"),
    "lacks the function": "int something_else;",
}
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs a C compiler and the loader of Linux"
)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages that is our own."""
    folder = tmp_path / "site-packages"
    (folder / "cmeel.prefix/lib").mkdir(parents=True)
    monkeypatch.setattr(blas.sysconfig, "get_paths", lambda: {"purelib": str(folder)})
    monkeypatch.setattr(blas, "_PROBE_S", 60.0)
    return folder


@pytest.fixture
def library(packages: Path) -> Path:
    return packages / "cmeel.prefix/lib/libopenblas.so"


def compile_to(target: Path, source: str, *options: str) -> None:
    command = ["cc", "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", str(target), *options]
    subprocess.run(command, input=source.encode(), check=True, timeout=60, capture_output=True)


def test_without_the_package_nothing_is_preloaded(packages: Path, tmp_path: Path) -> None:
    assert find_blas(tmp_path / "links") is None
    assert not (tmp_path / "links").exists()


@needs_compiler
def test_a_library_that_computes_is_taken(library: Path, tmp_path: Path) -> None:
    compile_to(library, SGEMM.replace("BODY", MULTIPLY))
    found = find_blas(tmp_path / "links")
    assert found is not None
    assert (found.library, found.environment) == (str(library), {"LD_PRELOAD": str(library)})


@on_linux
@pytest.mark.parametrize(
    "data", [b"", b"not a library at all\n", b"\x7fELF" + bytes(500), b"#!/bin/sh\nexit 0\n"], ids=repr
)
def test_a_file_that_is_no_library_is_not_taken(library: Path, tmp_path: Path, data: bytes) -> None:
    library.write_bytes(data)
    assert find_blas(tmp_path / "links") is None


@needs_compiler
def test_a_library_that_is_cut_off_is_not_taken(library: Path, tmp_path: Path) -> None:
    compile_to(library, SGEMM.replace("BODY", MULTIPLY))
    os.truncate(library, library.stat().st_size // 3)
    assert find_blas(tmp_path / "links") is None


@needs_compiler
@pytest.mark.parametrize("how", BROKEN)
def test_a_library_that_does_not_work_is_not_taken(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "never ends":
        monkeypatch.setattr(blas, "_PROBE_S", 0.5)
    compile_to(library, BROKEN[how])
    assert find_blas(tmp_path / "links") is None


@needs_compiler
def test_a_library_that_lacks_its_fortran_gets_the_one_of_the_mlx_wheel(packages: Path, tmp_path: Path) -> None:
    library = packages / "cmeel.prefix/lib/libopenblas.so"
    fortran = packages / "mlx_cpu.libs/libgfortran-f7379c93.so.5.0.0"
    fortran.parent.mkdir()
    compile_to(fortran, "int lmx_only_here(void) { return 1; }", "-Wl,-soname,libgfortran-f7379c93.so.5.0.0")
    # A name for the linker alone: what is linked against it wants libgfortran.so.5 at run time.
    build = tmp_path / "build"
    build.mkdir()
    compile_to(build / "libgfortran.so.5", "int lmx_only_here(void) { return 1; }", "-Wl,-soname,libgfortran.so.5")
    source = "int lmx_only_here(void);" + SGEMM.replace("BODY", "if (!lmx_only_here()) return;" + MULTIPLY)
    compile_to(library, source, "-x", "none", "-Wl,--no-as-needed", str(build / "libgfortran.so.5"))
    links = tmp_path / "links"
    for _ in range(2):
        found = find_blas(links)
        assert found is not None
        assert found.environment == {"LD_PRELOAD": f"{fortran}:{library}", "LD_LIBRARY_PATH": str(links)}
        assert (links / "libgfortran.so.5").resolve() == fortran
    assert links.stat().st_mode & 0o777 == 0o700
    assert find_blas(tmp_path / "no/such/place") is None


@on_linux
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the wheel is for x86-64")
def test_the_installed_library_works_here_or_is_left_out(tmp_path: Path) -> None:
    library = Path(sysconfig.get_paths()["purelib"]) / "cmeel.prefix/lib/libopenblas.so"
    if not library.exists():
        pytest.skip("cmeel-openblas is not installed")
    found = find_blas(tmp_path / "links")
    if "avx2" in Path("/proc/cpuinfo").read_text():
        assert found is not None
        assert found.library == str(library)
