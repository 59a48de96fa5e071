"""Rows 62 to 70 of the failure matrix: disks that are full, state that is damaged, folders that cannot be used."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from protocol.paths import Home, UnsafeHomeError
from tests.chaos.clients import OTHER, PATIENCE_S
from tests.chaos.figures import Figure
from tests.chaos.scene import Stage
from tests.chaos.test_rows_gateway import (
    PATIENT,
    ask,
    event_since,
    events_since,
    gateway_of,
    idle,
    load,
    patched,
    pids,
    stage_of,
    took,
    undisturbed,
    unload,
)
from tests.fault.plan import FaultPlan
from tests.harness import Lmx, deadline

STATE = ("desired", "desired.prev", "runtime", "runtime.prev")
#: The version of the protocol is what stands in a file beside this patch.
VERSION_PATCH = """
import os
if os.path.exists(f"{HERE}/version"):
    import protocol
    with open(f"{HERE}/version") as stream:
        protocol.PROTOCOL_VERSION = int(stream.read())
"""


@pytest.fixture(scope="module")
def stage(tiny_model: Path) -> Iterator[Stage]:
    with stage_of(tiny_model) as made:
        load(made, "second")
        yield made


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "512k") -> Iterator[None]:
    """Mount a disk of its own at a folder; skip where that is not allowed."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave no byte on a disk; return the file to remove."""
    file = folder / "filler"
    with file.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(4096))
    return file


def durable(lmx: Lmx, *, wanted: bool) -> dict[str, Any]:
    return lmx.wait_status(lambda doc: doc["supervisor"]["state_durable"] is wanted)


# -- disks that take nothing --------------------------------------------------------------------------------------


def test_row_62_state_cannot_be_written(stage: Stage, figure: Figure) -> None:
    """No file may grow (RLIMIT_FSIZE): what a full disk is to the supervisor."""
    lmx = stage.lmx
    assert lmx.process is not None
    before, gateway = pids(lmx), gateway_of(lmx)
    load(stage, "third")
    process = psutil.Process(lmx.process.pid)
    limits = process.rlimit(psutil.RLIMIT_FSIZE)
    with undisturbed(lmx):
        process.rlimit(psutil.RLIMIT_FSIZE, (0, limits[1]))
        try:
            unload(stage, "third")
            document = durable(lmx, wanted=False)
            assert document["supervisor"]["state_problem"]
            assert "STATE NOT DURABLE" in lmx.cli("status").stdout
            assert ask(lmx.url, "second").wait().whole
        finally:
            process.rlimit(psutil.RLIMIT_FSIZE, limits)
        free_at = time.monotonic()
        durable(lmx, wanted=True)
        figure("row 62", "durable again by itself", time.monotonic() - free_at, target=10.0)
    assert (pids(lmx), gateway_of(lmx)["pid"]) == (before, gateway["pid"])
    desired = json.loads((lmx.home / "state" / "desired").read_text().partition("\n")[2])
    assert [model["id"] for model in desired["models"]] == [OTHER, "second"], "what could not be written then is now"


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_row_62_state_disk_full_or_read_only(tiny_model: Path, figure: Figure, how: str) -> None:
    with contextlib.ExitStack() as stack:
        lmx = Lmx(**{**PATIENT, "LMX_WORKER__MODULE": "tests.fault"})
        stack.callback(lmx.close)
        folder = lmx.home / "state"
        stack.enter_context(small_disk(folder))
        lmx.start()
        lmx.load(tiny_model, OTHER)
        lmx.load(tiny_model, "second")
        victim = lmx.model("second")
        with undisturbed(lmx):
            filler = fill(folder) if how == "full" else None
            if filler is None:
                subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
            os.kill(victim["pid"], signal.SIGKILL)
            durable(lmx, wanted=False)
            assert "STATE NOT DURABLE" in lmx.cli("status", check=False).stdout
            lmx.wait_model("second", other_than=victim["incarnation"])
            assert ask(lmx.url, "second").wait().whole
            if filler is None:
                subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
            else:
                filler.unlink()
            free_at = time.monotonic()
            durable(lmx, wanted=True)
            figure("row 62", f"durable again by itself ({how})", time.monotonic() - free_at, target=10.0)
        # The journal goes on, every line of it whole.
        assert lmx.journal()
        assert lmx.stop() == 0


def test_row_62_home_disk_full(tiny_model: Path, figure: Figure) -> None:
    """Everything of LMX is on the full disk, also what the next process is told and writes: models still come back."""
    with contextlib.ExitStack() as stack:
        lmx = Lmx(**PATIENT)
        stack.callback(lmx.close)
        stack.enter_context(small_disk(lmx.home))
        lmx.home.chmod(0o700)
        lmx.start()
        lmx.load(tiny_model, OTHER)
        lmx.load(tiny_model, "second")
        victim = lmx.model("second")
        with undisturbed(lmx):
            filler = fill(lmx.home)
            killed_at = time.monotonic()
            os.kill(victim["pid"], signal.SIGKILL)
            lmx.wait_model("second", other_than=victim["incarnation"])
            figure("row 62", "a model back though the home's disk is full", time.monotonic() - killed_at, target=10.0)
            assert ask(lmx.url, "second").wait().whole
            durable(lmx, wanted=False)
        os.kill(gateway_of(lmx)["pid"], signal.SIGKILL)
        assert ask(lmx.url, "second").wait().whole
        filler.unlink()
        durable(lmx, wanted=True)
        assert lmx.stop() == 0


def test_row_63_log_disk_full(stage: Stage, figure: Figure) -> None:
    """Gateway and workers write logs alone: with no file allowed to grow, requests take as long as before."""
    lmx = stage.lmx
    gateway = gateway_of(lmx)
    processes = [psutil.Process(pid) for pid in (gateway["pid"], *pids(lmx).values())]

    usual, usual_p99 = took(lmx.url, "second", 150, max_tokens=2)
    limits = [process.rlimit(psutil.RLIMIT_FSIZE) for process in processes]
    for process, (_, hard) in zip(processes, limits, strict=True):
        process.rlimit(psutil.RLIMIT_FSIZE, (0, hard))
    try:
        with undisturbed(lmx):
            size = (lmx.home / "logs" / "gateway.log").stat().st_size
            without, without_p99 = took(lmx.url, "second", 150, max_tokens=2)
            assert (lmx.home / "logs" / "gateway.log").stat().st_size == size
    finally:
        for process, limit in zip(processes, limits, strict=True):
            process.rlimit(psutil.RLIMIT_FSIZE, limit)
    of_usual = 100 * without_p99 / usual_p99
    figure("row 63", "p99 of a request with a full log disk, of the usual", of_usual, target=100, unit="%")
    # The worst of many is as bad as the machine is busy; a log that blocks would block each.
    assert without < 3 * usual + 0.2
    assert ask(lmx.url, "second").wait().whole
    for _ in deadline(PATIENCE_S):
        if (lmx.home / "logs" / "gateway.log").stat().st_size > size:
            break
    else:
        raise AssertionError("nothing is logged any more")
    assert (gateway_of(lmx)["pid"], list(pids(lmx).values())) == (gateway["pid"], [p.pid for p in processes[1:]])


def test_row_63_a_process_starts_while_the_log_disk_is_full(tiny_model: Path) -> None:
    with contextlib.ExitStack() as stack:
        lmx = Lmx(**{**PATIENT, "LMX_WORKER__MODULE": "tests.fault"})
        stack.callback(lmx.close)
        stack.enter_context(small_disk(lmx.home / "logs"))
        lmx.start()
        lmx.load(tiny_model, OTHER)
        lmx.load(tiny_model, "second")
        fill(lmx.home / "logs")
        victim, gateway = lmx.model("second"), gateway_of(lmx)
        with undisturbed(lmx):
            os.kill(victim["pid"], signal.SIGKILL)
            lmx.wait_model("second", other_than=victim["incarnation"])
            assert ask(lmx.url, "second").wait().whole
        os.kill(gateway["pid"], signal.SIGKILL)
        lmx.wait_status(lambda doc: doc["gateway"]["state"] == "ready" and doc["gateway"]["pid"] != gateway["pid"])
        assert ask(lmx.url).wait().whole
        assert lmx.stop() == 0


# -- state that cannot be used ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"\0" * 4096, b"\xff{not state}\n[[["],
    ids=["zeros", "garbage"],
)
def test_row_64_state_corrupt_in_both_copies(tiny_model: Path, content: bytes) -> None:
    """10,000 mutations of the files are tests/unit/test_statefile.py; here a supervisor starts with nothing usable."""
    lmx = Lmx(**PATIENT, LMX_WORKER__MODULE="tests.fault", LMX_MODELS__AUTO_LOAD='["auto"]')
    try:
        shutil.copytree(tiny_model, lmx.home / "models" / "auto")
        folder = lmx.home / "state"
        folder.mkdir(mode=0o700)
        for name in STATE:
            (folder / name).write_bytes(content)
        lmx.start()
        lmx.wait_model("auto")
        assert ask(lmx.url, "auto").wait().whole
        log = (lmx.home / "logs" / "supervisor.log").read_text()
        assert log.count('"event":"state_recovered"') >= 4, "each damaged copy is named"
        assert {f"{name}.bad" for name in STATE} <= {entry.name for entry in folder.iterdir()}, "kept for a look"
        lmx.load(tiny_model, "by-hand")
        assert lmx.stop() == 0
        lmx.start()
        lmx.wait_status(lambda doc: [m["state"] for m in doc["models"]] == ["ready", "ready"])
    finally:
        lmx.close()


def test_row_65_state_of_a_newer_version(tiny_model: Path) -> None:
    lmx = Lmx(**PATIENT, LMX_WORKER__MODULE="tests.fault", LMX_MODELS__AUTO_LOAD='["auto"]')
    try:
        shutil.copytree(tiny_model, lmx.home / "models" / "auto")
        folder = lmx.home / "state"
        folder.mkdir(mode=0o700)
        written = {}
        for name in ("desired", "runtime"):
            body = b'{"of": "the future"}'
            digest = hashlib.sha256(body).hexdigest()
            header = {"kind": f"lmx.{name}", "schema": 99, "sequence": 7, "length": len(body), "sha256": digest}
            written[name] = json.dumps(header).encode() + b"\n" + body
            (folder / name).write_bytes(written[name])
        lmx.start()
        lmx.wait_model("auto")
        lmx.load(tiny_model, "by-hand")
        assert ask(lmx.url, "auto").wait().whole
        document = lmx.status()
        assert document is not None
        assert document["supervisor"]["state_durable"] is False
        assert "newer version" in document["supervisor"]["state_problem"]
        assert "STATE NOT DURABLE" in lmx.cli("status").stdout
        assert lmx.stop() == 0
        assert {name: (folder / name).read_bytes() for name in written} == written
    finally:
        lmx.close()


# -- folders ------------------------------------------------------------------------------------------------------


def _link(home: Path) -> None:
    (home / "elsewhere").mkdir(parents=True)
    (home / "run").symlink_to(home / "elsewhere")


def _file(home: Path) -> None:
    home.mkdir()
    (home / "run").write_text("")


def _foreign(home: Path) -> None:
    (home / "run").mkdir(parents=True)
    os.chown(home / "run", 12345, 12345)


def _foreign_root(home: Path) -> None:
    home.mkdir()
    os.chown(home, 12345, 12345)


def _open_root(home: Path) -> None:
    home.mkdir()
    home.chmod(0o777)


@pytest.mark.parametrize(
    ("damage", "words", "root_only"),
    [
        (_link, "a link is refused", False),
        (_file, "cannot create", False),
        (_open_root, "written by everybody", False),
        (_foreign, "belongs to uid 12345", True),
        (_foreign_root, "belongs to uid 12345", True),
    ],
)
def test_row_66_run_folder_that_cannot_be_trusted(
    lmx_home: Path, damage: Callable[[Path], None], words: str, root_only: bool
) -> None:
    if root_only and os.geteuid() != 0:
        pytest.skip("giving files away needs root")
    damage(lmx_home)
    with pytest.raises(UnsafeHomeError, match=words):
        Home(lmx_home).ensure()


def test_row_66_run_folder_is_refused_with_words_at_once(lmx_home: Path, figure: Figure) -> None:
    """The design's exit code for what has to be set right first is 5."""
    _link(lmx_home)
    too_long = Path("/tmp") / ("x" * 90)
    for home, words in ((lmx_home, "a link is refused"), (too_long, "too long")):
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "supervisor", "run"],
            env={**os.environ, "LMX_HOME": str(home)}, capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
        figure("row 66", "refused with words", time.monotonic() - began, target=1.0)
        assert done.returncode == 5
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not too_long.exists()
    others = Path("/tmp") / f"lmx-open-{os.getpid()}"
    try:
        (others / "run").mkdir(parents=True, mode=0o755)
        (others / "run").chmod(0o755)
        Home(others).ensure()
        assert (others / "run").stat().st_mode & 0o777 == 0o700, "ours: access for others is taken away"
    finally:
        shutil.rmtree(others)


@pytest.fixture
def lmx_home(tmp_path: Path) -> Iterator[Path]:
    home = Path("/tmp") / f"lmx-{os.getpid()}-{time.monotonic_ns() % 10**9}"
    yield home
    shutil.rmtree(home, ignore_errors=True)


def test_row_67_stale_sockets_and_pid_files(tiny_model: Path) -> None:
    lmx = Lmx(**PATIENT, LMX_WORKER__MODULE="tests.fault")
    try:
        run = lmx.home / "run"
        run.mkdir(mode=0o700)
        for name in ("supervisor.sock", "gateway.4.sock", "one-abcd1234.7.sock"):
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(str(run / name))
        (run / "supervisor.lock").write_text(f"{os.getpid()}\n")
        (run / "one-abcd1234.7.json").write_text("{half a spec")
        (run / "gateway.4.json").write_text("")
        (run / "one-abcd1234.9.json.tmp").write_text("")
        (run / "a folder.12.sock").mkdir()
        lmx.start()
        lmx.load(tiny_model, OTHER)
        assert lmx.model(OTHER)["incarnation"] > 7, "a number of before is not used again"
        assert ask(lmx.url).wait().whole
        left = {entry.name for entry in run.iterdir()}
        assert not left & {"gateway.4.sock", "one-abcd1234.7.sock", "one-abcd1234.7.json", "gateway.4.json"}, left
        assert lmx.stop() == 0
        assert not [entry for entry in run.iterdir() if entry.is_socket()]
    finally:
        lmx.close()


def test_row_69_model_folder_deleted_while_it_is_loaded(tiny_model: Path, figure: Figure, tmp_path: Path) -> None:
    """Real MLX: the process that has the weights serves on; the next one cannot be, and says so once."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    lmx = Lmx(**PATIENT).start()
    try:
        lmx.load(tiny_model, OTHER)
        lmx.load(folder, "gone")
        victim = lmx.model("gone")
        with undisturbed(lmx):
            shutil.rmtree(folder)
            assert ask(lmx.url, "gone").wait().whole
            killed_at = time.time()
            os.kill(victim["pid"], signal.SIGKILL)
            aside = event_since(lmx, killed_at, "model_readiness_changed", model="gone", state="quarantined")
            figure("row 69", "set aside after the death", aside["ts"] - killed_at, target=3.0)
            assert "does not exist" in aside["reason"] or "missing" in aside["reason"], aside
            assert len(events_since(lmx, killed_at, "process_started", model="gone")) == 1, "tried once"
            refused = ask(lmx.url, "gone").wait()
            assert (refused.status, refused.code) == (503, "model_quarantined")
            exited = [e for e in events_since(lmx, killed_at, "process_exited", model="gone") if e["code"]]
            assert [e["code"] for e in exited] == [66]
    finally:
        lmx.close()


def test_row_70_upgrade_to_another_protocol_version(tiny_model: Path, tmp_path: Path) -> None:
    """What is installed speaks another version than what runs: all is replaced, one after the other, and none fails."""
    site = tmp_path / "site"
    with stage_of(tiny_model, LMX_LIFECYCLE__DRAIN_S="15", **patched(site, all=VERSION_PATCH)) as stage:
        lmx = stage.lmx
        load(stage, "second")
        before, gateway, url, since = pids(lmx), gateway_of(lmx), lmx.url, time.time()
        with undisturbed(lmx):
            # A second or so each; what is started next answers alike.
            stage.plans(FaultPlan(models=(OTHER,), answer_tokens=1000))
            tokens = {OTHER: 150, "second": 750}
            calls = [ask(url, m, f"[[tokens {n}]]", max_tokens=n) for m, n in tokens.items() for _ in range(2)]
            for call in calls:
                call.wait_chunks(1)
            (site / "version").write_text("2")
            lmx.cli("upgrade")
            lmx.wait_status(
                lambda doc: (
                    all(m["state"] == "ready" and m["pid"] != before[m["id"]] for m in doc["models"])
                    and doc["gateway"]["pid"] != gateway["pid"]
                )
            )
            for call in calls:
                call.wait()
            assert [repr(call) for call in calls if not call.whole] == []
            assert ask(url, "second").wait().whole
        rolled = [e["model"] for e in events_since(lmx, since, "worker_rolled")]
        assert sorted(rolled) == [OTHER, "second"]
        starting = 0
        for entry in events_since(lmx, since):
            starting += entry["event"] == "process_started" and bool(entry["model"])
            starting -= entry["event"] == "model_readiness_changed" and entry["state"] == "ready"
            assert starting <= 1, "one at a time"
        idle(lmx)
        assert lmx.stop() == 0
