"""Crash records: what is kept of a process's output, the folder of crashes, and `lmx-supervisor crashes`."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.paths import Home
from protocol.states import CliExit
from supervisor import crashes as module
from supervisor.blackbox import BlackBox
from supervisor.cli import crashes as command
from supervisor.crashes import (
    MAX_CRASHES,
    MAX_STDERR_BYTES,
    CrashRecord,
    CrashStore,
    UnknownCrashError,
    crash_id,
    versions,
)
from supervisor.output import safe_tail, stacks_in, start_of, tail_of
from supervisor.platform.reports import killed_by_jetsam, panics_since, report_folders

CORPUS = Path(__file__).resolve().parents[1] / "corpus" / "crashes"
AT = 1_795_262_581.0  # 2026-11-21 12:03:01 UTC
SECRET = "Zq-my-secret-prompt"


def crash(incarnation: int = 7, at: float = AT, **more: Any) -> CrashRecord:
    fields: dict[str, Any] = {
        "id": crash_id(at, "tiny-ab12", incarnation),
        "model": "tiny",
        "slot": "tiny-ab12",
        "incarnation": incarnation,
        "pid": 4711,
        "at": at,
        "kind": "metal_oom",
        "words": "Metal ran out of memory (SIGABRT)",
        "hint": "use less",
        "signal": "SIGABRT",
        "phase": "decode",
        "step": 42,
        "uptime_s": 61.5,
        "memory": ((1.0, 2**30), (0.0, None)),
        "requests": ("req-1", "req-2"),
        "stderr_tail": "Abort trap: 6\n",
        "versions": {"lmx": "0.1.0"},
    }
    return CrashRecord(**{**fields, **more})


@pytest.fixture
def store(tmp_path: Path) -> CrashStore:
    return CrashStore(tmp_path / "crashes")


# -- output -----------------------------------------------------------------------------------------------------

OUTPUT = """\
libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command buffer execution failed: \
Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout).
Traceback (most recent call last):
  File "/Users/x/.venv/lib/python3.11/site-packages/mlx_lm/generate.py", line 1855, in next
    return self._next(SECRET)
           ~~~~~~~~~~^^^^^^^^
  File "/Users/x/SECRET/app.py", line 5, in SECRET
RuntimeError: [metal::malloc] Resource limit (499000) exceeded.
jinja2.exceptions.TemplateError: SECRET
SECRET
The above exception was the direct cause of the following exception:
SecretError: SECRET
KeyError
Exception in thread SECRET:
Assertion failed: SECRET (src/msg.cpp:393)
Too many open files (src/signaler.cpp:681)
\x1b[31mSECRET\x1b[0m\r
Fatal Python error: Segmentation fault

Current thread 0x00007fd5ba651b80 (most recent call first):
  File "/opt/lib/python3.11/ctypes/__init__.py", line 519 in string_at
  <no Python frame>
"""

KEPT = """\
libc++abi: terminating due to uncaught exception of type std::runtime_error: Caused GPU Timeout Error \
(00000002:kIOGPUCommandBufferCallbackErrorTimeout)
Traceback (most recent call last):
  File "mlx_lm/generate.py", line 1855, in next
<line of 42 characters>
           ~~~~~~~~~~^^^^^^^^
<line of 76 characters>
RuntimeError: [metal::malloc] Resource limit (499000) exceeded
jinja2.exceptions.TemplateError: <message of 19 characters>
<line of 19 characters>
The above exception was the direct cause of the following exception:
<line of 32 characters>
KeyError
Exception in thread:
Assertion failed: <message of 19 characters> (msg.cpp:393)
Too many open files
<line of 19 characters>
Fatal Python error: Segmentation fault

Current thread 0x00007fd5ba651b80 (most recent call first):
  File "ctypes/__init__.py", line 519 in string_at
  <no Python frame>
"""


def test_what_is_known_is_kept_and_everything_else_blanked() -> None:
    assert safe_tail(OUTPUT.replace("SECRET", SECRET), MAX_STDERR_BYTES) == KEPT


def test_the_newest_lines_are_kept_whole_within_the_limit() -> None:
    text = safe_tail("Abort trap: 6\n" * 5000 + "KeyError\n", 1000)
    assert len(text.encode()) <= 1000
    assert text.endswith("Abort trap: 6\nKeyError\n")
    assert set(text.splitlines()) == {"Abort trap: 6", "KeyError"}


words = st.text(st.characters(categories=["L", "N", "P", "Zs"]), max_size=30)
shapes = st.sampled_from(
    [
        *("{0}", "{0}: {1}", "  {0}", "Traceback (most recent call last):", '  File "{0}", line 3, in {1}'),
        *("RuntimeError: {0}", "Exception in thread {0}", "libc++abi: {0}", "Fatal Python error: {0}"),
        *("Thread 0x00 (most recent call first): {0}", "terminate called after throwing an instance of '{0}'"),
        *("Assertion failed: {0} (src/{1}.cpp:3)", "[METAL] {0}", "<line of {0} characters>", "dyld[1]: {0}"),
        *("Too many open files {0}", "usage: {0}", "\x1b[0m{0}", "ValueError: <message of 3 characters>{0}"),
    ]
)
outputs = st.lists(
    st.builds(lambda shape, a, b: shape.format(a, b), shapes, words, words), max_size=30
).map("\n".join)  # fmt: skip


@given(text=st.one_of(outputs, st.text(max_size=500), st.binary(max_size=500).map(lambda b: b.decode("latin-1"))))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_blanking_twice_changes_nothing_more(text: str) -> None:
    once = safe_tail(text, MAX_STDERR_BYTES)
    assert safe_tail(once, MAX_STDERR_BYTES) == once
    assert not [character for character in once if character != "\n" and not character.isprintable()]


@given(shape=shapes, other=words)
@settings(max_examples=300, deadline=None)
def test_no_word_of_a_line_survives_in_any_shape(shape: str, other: str) -> None:
    secret = "Zq my private words qZ"  # with spaces: no identifier, type or function is written so
    for line in (shape.format(secret, other), shape.format(other, secret), shape.format(secret, secret)):
        assert "private" not in safe_tail(line, MAX_STDERR_BYTES)


def test_stacks_of_a_real_dump_are_found_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "out"
    program = (
        "import faulthandler, signal, os, threading\n"
        "faulthandler.register(signal.SIGUSR1, all_threads=True)\n"
        "there, go = threading.Event(), threading.Event()\n"
        "threading.Thread(target=lambda: (there.set(), go.wait())).start()\n"
        "there.wait()\n"
        "print('before', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "print('after', flush=True)\n"
        "go.set()\n"
    )
    with file.open("wb") as stream:
        subprocess.run([sys.executable, "-c", program], stdout=stream, stderr=stream, check=True)
    dump = stacks_in(tail_of(file, 0))
    assert "most recent call first" in dump
    assert "before" not in dump
    assert "after" not in dump
    kept = safe_tail(dump, MAX_STDERR_BYTES)
    assert kept.count("most recent call first") == 2
    assert "in run" in kept  # threading.py


def test_output_without_a_dump_has_no_stacks() -> None:
    assert stacks_in("nothing\n  File here\n") == ""


# -- reading only what this process wrote -------------------------------------------------------------------------


def test_only_what_was_written_after_the_start_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.out"
    assert start_of(file) == 0
    file.write_bytes(b"of the last process\n")
    start = start_of(file)
    assert tail_of(file, start) == ""
    with file.open("ab") as stream:
        stream.write(b"mine \xff\n")
    assert tail_of(file, start) == "mine \ufffd\n"


def test_a_file_that_was_turned_over_is_new_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "x.out"
    file.write_bytes(b"mine\n")
    assert tail_of(file, 10_000_000) == "mine\n"


def test_a_long_output_is_cut_at_a_line(tmp_path: Path) -> None:
    file = tmp_path / "x.out"
    file.write_bytes(b"old\n" + b"line\n" * 100)
    assert tail_of(file, 4, limit=12) == "line\nline\n"


def test_no_output_and_links_read_as_nothing(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    os.mkfifo(tmp_path / "fifo")
    for name in ("missing", "link", "fifo"):
        assert tail_of(tmp_path / name, 0) == ""


def test_a_black_box_knows_one_process_only(tmp_path: Path) -> None:
    file = tmp_path / "x.out"
    file.write_bytes(b"of the last process\n")
    box = BlackBox(file)
    with file.open("ab") as stream:
        stream.write(b"mine\n")
    for second in range(100):
        box.weigh(1000.0 + second, second if second % 2 else None)
    assert box.tail() == "mine\n"
    assert len(box.memory(1100.0)) == 60
    assert box.memory(1100.0)[-2:] == ((2.0, None), (1.0, 99))


# -- the folder ---------------------------------------------------------------------------------------------------


def test_a_crash_is_written_privately_and_read_back(store: CrashStore, tmp_path: Path) -> None:
    dump = 'Current thread 0x01 (most recent call first):\n  File "worker/batch.py", line 3 in step'
    written = store.write(crash(), stacks=dump)
    assert written is not None
    folder = tmp_path / "crashes" / "20261121T120301-tiny-ab12-7"
    assert {entry.name: entry.stat().st_mode & 0o777 for entry in folder.iterdir()} == {
        "record.json": 0o600,
        "stderr.txt": 0o600,
        "stacks.txt": 0o600,
    }
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    document = json.loads((folder / "record.json").read_text())
    assert (document["schema"], document["class"]) == ("lmx.crash/1", "metal_oom")
    assert store.read(written.id) == written == msgspec.structs.replace(crash(), stacks="stacks.txt")
    assert store.stacks(written) == dump
    assert store.records() == [msgspec.structs.replace(written, stderr_tail="")]


def test_no_secret_reaches_the_disk(store: CrashStore, tmp_path: Path) -> None:
    text = f"{SECRET}\nValueError: {SECRET}\n"
    assert store.write(crash(stderr_tail=text), stacks=text)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 3
    assert not [file for file in files if SECRET in file.read_text()]


def test_a_record_is_bounded(store: CrashStore) -> None:
    huge = crash(
        memory=tuple((float(age), age) for age in range(500, 0, -1)),
        requests=tuple(f"req {number}\n" + "x" * 100 for number in range(1000)),
        stderr_tail="KeyError\n" * 10_000,
    )
    written = store.write(huge)
    assert written is not None
    assert (len(written.memory), written.memory[-1]) == (60, (1.0, 1))
    assert len(written.requests) == 256
    assert {len(request) for request in written.requests} == {64}
    assert len(written.stderr_tail.encode()) <= MAX_STDERR_BYTES


def test_only_the_newest_are_kept_even_when_the_clock_goes_back(store: CrashStore) -> None:
    for number in range(MAX_CRASHES + 5):
        assert store.write(crash(number, AT + number))
    assert len(store.ids()) == MAX_CRASHES
    assert store.ids()[-1] == crash_id(AT + 5, "tiny-ab12", 5)
    written = store.write(crash(999, AT - 1_000_000))
    assert written is not None
    assert written.id in store.ids()
    assert len(store.ids()) == MAX_CRASHES


def test_an_id_is_never_used_twice(store: CrashStore) -> None:
    first, second = store.write(crash()), store.write(crash(model="other"))
    assert first is not None
    assert second is not None
    assert second.id == f"{first.id}.2"
    assert (store.read(first.id).model, store.read(second.id).model) == ("tiny", "other")


def test_a_crash_is_found_by_the_beginning_of_its_id(store: CrashStore) -> None:
    store.write(crash(1))
    store.write(crash(2, AT + 60))
    assert store.read("20261121T1204").incarnation == 2
    with pytest.raises(UnknownCrashError, match="2 crashes begin"):
        store.read("2026")
    for wanted in ("", "2027", "../crashes", "/etc"):
        with pytest.raises(UnknownCrashError):
            store.read(wanted)


def test_what_is_no_crash_is_left_out_and_left_alone(store: CrashStore, tmp_path: Path) -> None:
    assert store.write(crash())
    folder = tmp_path / "crashes"
    (folder / "notes").mkdir()
    (folder / "20261121T120302-x-1").symlink_to(tmp_path)
    for name, content in {"20261121T120303-x-1": b"{", "20261121T120304-x-1": b"[" * 100_000}.items():
        (folder / name).mkdir()
        (folder / name / "record.json").write_bytes(content)
    os.mkfifo(folder / "20261121T120303-x-1" / "stderr.txt")
    assert [record.incarnation for record in store.records()] == [7]
    with pytest.raises(UnknownCrashError):
        store.read("20261121T120303")
    assert (folder / "notes").is_dir()


def test_a_half_written_crash_is_invisible_and_swept(store: CrashStore, tmp_path: Path) -> None:
    left = tmp_path / "crashes" / ".tmp-1-1"
    left.mkdir(parents=True)
    assert store.records() == []
    store.write(crash())
    assert not left.exists()


@pytest.mark.parametrize("call", ["open", "write", "fsync"])
def test_a_full_disk_costs_the_record_and_nothing_else(
    store: CrashStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert store.write(crash(1))
    with monkeypatch.context() as patch:
        patch.setattr(module.os, call, full)
        assert store.write(crash(2)) is None
        store.rewrite(crash(1))
    assert [record.incarnation for record in store.records()] == [1]
    assert store.write(crash(2))
    assert sorted(entry.name for entry in (tmp_path / "crashes").iterdir()) == sorted(store.ids())
    assert len(store.ids()) == 2


def test_a_short_write_is_followed_by_the_rest(store: CrashStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk and a file size limit give a short write first."""
    whole = os.write
    monkeypatch.setattr(module.os, "write", lambda descriptor, data: whole(descriptor, bytes(data)[:7]))
    written = store.write(crash())
    assert written is not None
    assert store.read(written.id) == written


def test_a_name_that_is_no_unicode_costs_the_record(store: CrashStore) -> None:
    assert store.write(crash(model="\udcff")) is None
    assert store.ids() == []


def test_a_folder_that_cannot_be_made_costs_the_record(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = CrashStore(tmp_path / "file" / "crashes")
    assert store.write(crash()) is None
    assert store.records() == []


def test_a_record_can_be_replaced_when_a_report_comes_late(store: CrashStore) -> None:
    written = store.write(crash(kind="killed"))
    assert written is not None
    store.rewrite(msgspec.structs.replace(written, kind="jetsam"))
    assert store.read(written.id) == msgspec.structs.replace(written, kind="jetsam")


def test_the_versions_that_matter_are_known() -> None:
    assert {"mlx", "mlx-lm", "pyzmq"} <= set(versions())


# -- reports ------------------------------------------------------------------------------------------------------


def reports(folder: Path, *names: str, at: float = AT) -> tuple[Path, ...]:
    folder.mkdir(exist_ok=True)
    for name in names:
        target = folder / (f"JetsamEvent-{name}" if name.endswith(".ips") else name)
        target.write_bytes((CORPUS / name).read_bytes())
        os.utime(target, (at, at))
    return (folder, folder / "missing")


def test_a_jetsam_report_since_the_start_explains_a_sigkill(tmp_path: Path) -> None:
    folders = reports(tmp_path, "jetsam_compressor.ips", "crash_report_is_no_jetsam.ips")
    event_at = 1_775_790_326.0
    assert killed_by_jetsam(90131, event_at - 60, folders) == "vm-compressor-space-shortage"
    assert killed_by_jetsam(412, event_at - 60, folders) == ""
    assert killed_by_jetsam(90131, event_at + 60, folders) == ""  # of another process with the same pid
    assert killed_by_jetsam(90131, AT + 60, folders) == ""


def test_panics_are_found_with_their_time(tmp_path: Path) -> None:
    folders = reports(tmp_path, "panic-full-underflow.panic", "panic-full-watchdog.panic", "panic-full-other.panic")
    found = panics_since(1_770_000_000.0, folders)
    assert [(report.at, report.kind) for report in found] == [(1_776_666_612.0, "gpu_memory")]
    assert len(panics_since(0, folders)) == 3


def test_only_a_bounded_number_of_reports_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        (tmp_path / f"panic-full-{number}.panic").write_text("panic(cpu 1 caller 0x1): x")
    (tmp_path / "panic-full-link.panic").symlink_to("/etc/hostname")
    os.mkfifo(tmp_path / "panic-full-fifo.panic")
    assert len(panics_since(0, [tmp_path])) == 20


def test_linux_has_no_reports() -> None:
    if sys.platform != "darwin":
        assert report_folders() == ()


# -- the command line ---------------------------------------------------------------------------------------------


def run(home: Path, *arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(command, arguments, obj=Home(home))
    return result.exit_code, result.stdout, result.stderr


def test_crashes_are_listed_without_a_supervisor(store: CrashStore, tmp_path: Path) -> None:
    assert run(tmp_path) == (0, "no crashes\n", "")
    store.write(crash(1))
    store.write(crash(2, AT + 60, model="", kind="native_crash", signal=None, code=3, phase=""))
    code, out, _ = run(tmp_path)
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert lines[0] == ["CRASH", "MODEL", "CLASS", "HOW", "PHASE", "UP", "AGE"]
    assert lines[1][:6] == [crash_id(AT + 60, "tiny-ab12", 2), "gateway", "native_crash", "exit", "3", "-"]
    assert lines[2][:5] == [crash_id(AT, "tiny-ab12", 1), "tiny", "metal_oom", "SIGABRT", "decode"]


def test_one_crash_is_shown_whole(store: CrashStore, tmp_path: Path) -> None:
    dump = 'Current thread 0x01 (most recent call first):\n  File "worker/batch.py", line 3 in step'
    store.write(crash(degraded=True, requests=tuple(f"r{number}" for number in range(12))), stacks=dump)
    code, out, _ = run(tmp_path, "2026")
    assert code == 0
    for part in ("tiny (degraded)", "metal_oom: Metal ran out", "use less", "decode, step 42", "1.0 GiB 1 s before"):
        assert part in out
    for part in ("? 0 s before", "r9 and 2 more", "lmx 0.1.0", "  Abort trap: 6", "line 3 in step"):
        assert part in out


def test_json_is_the_document_of_the_schema(store: CrashStore, tmp_path: Path) -> None:
    store.write(crash())
    listed = json.loads(run(tmp_path, "--json")[1])
    assert (listed["schema"], len(listed["crashes"])) == ("lmx.crashes/1", 1)
    assert "stderr" not in listed["crashes"][0]
    shown = json.loads(run(tmp_path, "--json", listed["crashes"][0]["id"])[1])
    assert shown["schema"] == "lmx.crashes/1"
    assert shown["crash"] == {**listed["crashes"][0], "stderr": "Abort trap: 6\n", "stacks": None}
    assert shown["crash"]["memory"] == [[1.0, 2**30], [0.0, None]]


def test_an_unknown_crash_is_an_error_in_words(tmp_path: Path) -> None:
    code, out, err = run(tmp_path, "nope")
    assert (code, out) == (CliExit.FAILED, "")
    assert "no readable crash 'nope'" in err
