"""Rows 45 to 60 of the failure matrix: the supervisor dies at any point; its host restarts, sleeps, loses its clock."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from protocol.config import LifecycleConfig
from protocol.statefile import StateFile
from supervisor.safety import Strike, crash_loop_of_supervisor
from tests.chaos.clients import OTHER, PATIENCE_S
from tests.chaos.figures import Figure
from tests.chaos.scene import Stage, load_mark
from tests.chaos.test_rows_gateway import (
    ask,
    event_since,
    events_since,
    gateway_of,
    load,
    patched,
    pids,
    stage_of,
    undisturbed,
    workers_of,
)
from tests.fault.pipe import Pipe
from tests.fault.plan import FaultPlan
from tests.harness import Lmx, deadline

#: The supervisor kills itself, or a function raises, when it reaches the point that is named in the file "point".
SUPERVISOR_PATCH = """
import functools, os, signal, time
import supervisor.launch, supervisor.views, supervisor.host, supervisor.lifecycle
from protocol import control
from supervisor.clock import Clock
from supervisor.crash_reports import CrashReports
from supervisor.host import Host, Managed
from supervisor.journal import Journal
from supervisor.launch import Launcher
from supervisor.peers import Peers
from supervisor.platform.linux import Linux
from supervisor.record import Record

def reached(point):
    file = f"{HERE}/point"
    try:
        with open(file) as stream:
            deed, _, name = stream.read().partition(" ")
    except FileNotFoundError:
        return
    if name == point:
        os.unlink(file)
        if deed == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError(f"made up by a test at {point}")

def around(owner, name, *, before=None, after=None, only=lambda *args, **kwargs: True):
    real = getattr(owner, name)
    @functools.wraps(real)
    def wrapped(*args, **kwargs):
        if before and only(*args, **kwargs):
            reached(before)
        result = real(*args, **kwargs)
        if after and only(*args, **kwargs):
            reached(after)
        return result
    setattr(owner, name, wrapped)

around(Record, "mark_load", before="before the mark", after="after the mark")
around(Launcher, "worker_spec", after="spec written")
around(supervisor.launch, "spawn", after="process spawned", only=lambda platform, module, *_, **__: module != "gateway")
around(Journal, "write", after="start written", only=lambda self, name, **_: name == "process_started")
around(Host, "feed", after="start fed", only=lambda self, managed, event: type(event).__name__ == "Started")
around(Peers, "_belongs", before="hello", only=lambda self, managed, hello, _: isinstance(hello, control.WorkerHello))
for kind in (control.Loading, control.Ready, control.Heartbeat):
    is_it = lambda self, managed, message, kind=kind: isinstance(message, kind)
    around(Peers, "_hear", before=f"before {kind.__name__}", after=f"after {kind.__name__}", only=is_it)
around(Managed, "tell", before="ping", only=lambda self, message: isinstance(message, control.Ping))
around(Linux, "footprint", before="sample")
around(Clock, "_tick", before="tick")
around(supervisor.host.life, "may_start", before="pump")
around(supervisor.views, "catalog_model", before="catalog")
around(supervisor.views, "status_document", before="status")
around(CrashReports, "explain", before="end")

if os.path.exists(f"{HERE}/clock"):
    with open(f"{HERE}/clock") as stream:
        offset = float(stream.read())
    real_time = time.time
    time.time = lambda: real_time() + offset
"""
#: Requests of a second or so: the other model is the slower one.
LONG = ((OTHER, "[[tokens 120]]"), ("second", "[[tokens 600]]"))
#: Imports of a worker that take longer than a supervisor's start.
SLOW_START = """
import os, time
if os.path.exists(f"{HERE}/slow"):
    time.sleep(1.5)
"""
SPAWN_POINTS = ["after the mark", "process spawned", "start fed", "hello", "after Ready"]
#: Where an exception must not matter, and where it meets the end or the start of a process.
QUIET_POINTS = ["ping", "sample", "catalog", "status", "before Heartbeat"]
RAISE_POINTS = ["pump", "hello", "end"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("site") / "site"


@pytest.fixture(scope="module")
def stage(tiny_model: Path, site: Path) -> Iterator[Stage]:
    settings = patched(site, supervisor=SUPERVISOR_PATCH, **{"tests.fault": SLOW_START})
    with stage_of(tiny_model, LMX_LIFECYCLE__ADOPT_S="3", **settings) as made:
        load(made, "second")
        yield made


def ended(lmx: Lmx) -> None:
    """Wait until the supervisor has killed itself."""
    assert lmx.process is not None
    lmx.process.wait(60)


def all_ready(lmx: Lmx, count: int, within_s: float = 60.0) -> None:
    lmx.wait_status(lambda doc: [m["state"] for m in doc["models"]] == ["ready"] * count, within_s)


def state(lmx: Lmx, name: str) -> tuple[StateFile, Any]:
    """Return one of the state files and its content; nobody may be running that owns it."""
    file = StateFile(lmx.home / "state" / name, kind=f"lmx.{name}", schema=1)
    return file, file.load().payload


def reboot(lmx: Lmx) -> None:
    """Make the next supervisor believe that the machine was started anew since."""
    file, runtime = state(lmx, "runtime")
    file.save({**runtime, "boot_id": "of-another-boot"})


# -- the supervisor dies ------------------------------------------------------------------------------------------


def test_row_45_supervisor_killed_under_load(stage: Stage, figure: Figure) -> None:
    lmx, url = stage.lmx, stage.lmx.url
    before, gateway = pids(lmx), gateway_of(lmx)
    with undisturbed(lmx):
        calls = [ask(url, "second", "[[tokens 2000]]", max_tokens=2000) for _ in range(4)]
        for call in calls:
            call.wait_chunks(1)
        lmx.kill_supervisor()
        assert ask(url, "second").wait().whole, "it serves on"
        snapshot = lmx.cli("status", "--json", check=False)
        assert snapshot.returncode == 4
        assert {m["id"] for m in json.loads(snapshot.stdout)["models"]} == set(before)
        since = time.time()
        lmx.start()
        adopted = [event_since(lmx, since, "process_adopted", pid=pid) for pid in (gateway["pid"], *before.values())]
        took = max(entry["ts"] for entry in adopted) - since
        figure("row 45", "everything adopted after its start", took, target=2.0)
        assert took < 20
        for call in calls:
            assert call.wait().whole, repr(call)
    assert (pids(lmx), gateway_of(lmx)["pid"], lmx.url) == (before, gateway["pid"], url)
    assert events_since(lmx, since, "process_started") == []


@pytest.mark.parametrize("orphaned", [False, True], ids=["under_its_supervisor", "adopted"])
def test_row_45_a_gateway_that_drains_is_relieved(tiny_model: Path, tmp_path: Path, orphaned: bool) -> None:
    """Somebody told it to end. It has a long answer to finish; new requests are the next one's."""
    settings = {"LMX_LIFECYCLE__DRAIN_S": "100", "LMX_LIFECYCLE__DECODE_S": "100"}
    with stage_of(tiny_model, **settings) as stage, Pipe(tmp_path / "pipe") as pipe:
        stage.plans(FaultPlan(models=("stepped",), step_pipe=str(pipe.file)))
        load(stage, "stepped")
        lmx, since = stage.lmx, time.time()
        before, models = gateway_of(lmx), pids(lmx)
        long = ask(lmx.url, "stepped", "[[tokens 10]]", max_tokens=10)
        pipe.let(4)
        long.wait_chunks(1)
        if orphaned:
            lmx.kill_supervisor()
        os.kill(before["pid"], signal.SIGTERM)
        if orphaned:
            lmx.start(wait=False)
        event_since(lmx, since, "gateway_relieved")
        lmx.wait_status(lambda d: d["gateway"]["state"] == "ready" and d["gateway"]["pid"] != before["pid"])
        assert ask(lmx.url).wait().whole
        assert not long.ended_at, "the next one serves while the last one ends what it has"
        pipe.let(10)
        assert long.wait().whole
        assert pids(lmx) == models


def test_row_46_supervisor_dead_for_longer_than_the_lease(tiny_model: Path, figure: Figure) -> None:
    with stage_of(tiny_model, LMX_LIFECYCLE__LEASE_S="2.5", LMX_LIFECYCLE__DRAIN_S="1") as stage:
        lmx, url = stage.lmx, stage.lmx.url
        load(stage, "second")
        processes = [p for p in lmx.processes() if lmx.process is not None and p.pid != lmx.process.pid]
        assert len(processes) == 3
        call = ask(url, text="[[tokens 4000]]", max_tokens=4000).wait_chunks(3)
        killed_at = time.monotonic()
        lmx.kill_supervisor()
        _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
        assert alive == [], "left over without a supervisor"
        took = time.monotonic() - killed_at
        figure("row 46", "nothing left, lease 2.5 s and drain 1 s", took, target=4.5)
        assert took > 1.4, "they waited for the next supervisor"
        call.wait()
        assert call.error or call.broken
        assert lmx.processes() == []
        logs = {file.name: file.read_text() for file in (lmx.home / "logs").glob("*.log")}
        for name in ("gateway", "other-", "second-"):
            text = next(content for file, content in logs.items() if file.startswith(name))
            assert '"event":"lease_expired"' in text
            assert '"code":90' in text
        lmx.start()
        all_ready(lmx, 2)
        assert ask(lmx.url).wait().whole


@pytest.mark.parametrize("point", SPAWN_POINTS)
def test_row_47_supervisor_dies_in_the_middle_of_a_start(stage: Stage, site: Path, point: str) -> None:
    lmx = stage.lmx
    gateway, other, victim = gateway_of(lmx), lmx.model(OTHER), lmx.model("second")
    since, most = time.time(), 0
    with undisturbed(lmx):
        (site / "point").write_text(f"die {point}")
        if point in {"process spawned", "start fed"}:
            (site / "slow").touch()  # it says hello when the next supervisor has long been there
        os.kill(victim["pid"], signal.SIGKILL)
        ended(lmx)
        assert len(workers_of(lmx, "second")) <= 1
        lmx.start(wait=False)
        for _ in deadline(60):
            most = max(most, len(workers_of(lmx, "second")))
            document = lmx.status()
            if document and [m["state"] for m in document["models"]] == ["ready", "ready"]:
                break
        (site / "slow").unlink(missing_ok=True)
        for _ in deadline(PATIENCE_S):
            if workers_of(lmx, "second") == [lmx.model("second")["pid"]]:
                break
        assert workers_of(lmx, "second") == [lmx.model("second")["pid"]]
        assert most <= 1, "two workers of one model at a time"
        assert ask(lmx.url, "second").wait().whole
    assert (gateway_of(lmx)["pid"], lmx.model(OTHER)["pid"]) == (gateway["pid"], other["pid"])
    assert events_since(lmx, since, "safe_mode_activated") == []
    for _ in deadline(PATIENCE_S):
        if load_mark(lmx) == "":
            break
    assert load_mark(lmx) == ""
    names = {entry.name for entry in (lmx.home / "run").iterdir()}
    mine = lmx.model("second")["incarnation"]
    assert {n for n in names if n.startswith("second-") and f".{mine}." not in n} == set()


@pytest.mark.parametrize("damage", ["half of it is missing", "only a temporary file", "both copies are gone"])
def test_row_48_supervisor_dies_while_it_writes_its_state(stage: Stage, damage: str) -> None:
    """What a death leaves at any system call is tests/unit/test_statefile.py; here the next supervisor meets it."""
    lmx = stage.lmx
    before, gateway = pids(lmx), gateway_of(lmx)
    live = lmx.home / "state" / "runtime"
    with undisturbed(lmx):
        lmx.kill_supervisor()
        if damage == "half of it is missing":
            os.truncate(live, live.stat().st_size // 2)
        else:
            live.rename(live.with_suffix(".tmp"))
            if damage == "both copies are gone":
                live.with_name("runtime.prev").unlink()
        lmx.start()
        all_ready(lmx, 2)
        assert ask(lmx.url, "second").wait().whole
    assert (pids(lmx), gateway_of(lmx)["pid"]) == (before, gateway["pid"])
    if damage == "half of it is missing":
        log = (lmx.home / "logs" / "supervisor.log").read_text()
        assert '"event":"state_recovered"' in log


def test_row_49_supervisor_and_worker_die_together(stage: Stage, figure: Figure) -> None:
    lmx, url = stage.lmx, stage.lmx.url
    before, gateway = pids(lmx), gateway_of(lmx)
    with undisturbed(lmx):
        lmx.kill_supervisor()
        os.kill(before["second"], signal.SIGKILL)
        waiting = ask(url, "second")
        began = time.time()
        lmx.start()
        ready = event_since(lmx, began, "model_readiness_changed", model="second", state="ready")
        figure("row 49", "ready again after the start", ready["ts"] - began, target=6.0)
        waiting.wait()
        assert waiting.whole or waiting.status == 503, repr(waiting)
        assert ask(url, "second").wait().whole
    after = pids(lmx)
    assert after[OTHER] == before[OTHER]
    assert after["second"] != before["second"]
    assert gateway_of(lmx)["pid"] == gateway["pid"]


# -- the supervisor's own faults ----------------------------------------------------------------------------------


def test_row_50_supervisor_crash_loop(tiny_model: Path) -> None:
    with stage_of(tiny_model, LMX_LIFECYCLE__SAFE_MODE_STARTS="3") as stage:
        lmx = stage.lmx
        load(stage, "second")
        before = lmx.model("second")
        with undisturbed(lmx):
            for _ in range(2):
                lmx.kill_supervisor()
                for pid in workers_of(lmx, "second"):
                    os.kill(pid, signal.SIGKILL)
                lmx.start()
            document = lmx.status()
            assert document is not None
            assert "3 starts" in document["supervisor"]["safe_mode"]
            assert [m["id"] for m in document["models"]] == [OTHER], "what lives is adopted, nothing else is loaded"
            assert "SAFE MODE" in lmx.cli("status", check=False).stdout
            refused = ask(lmx.url, "second").wait()
            assert refused.status in {404, 503}
            lmx.cli("resume")
            lmx.wait_model("second", other_than=before["incarnation"])
        assert ask(lmx.url, "second").wait().whole


def test_row_51_exception_in_one_handler(stage: Stage, site: Path) -> None:
    """A ping, a sample, a heartbeat, a catalog, a status that fail once are not the last."""
    lmx = stage.lmx
    assert lmx.process is not None
    log, gateway, other = lmx.home / "logs" / "supervisor.log", gateway_of(lmx), lmx.model(OTHER)
    seen, unreached = log.stat().st_size, []
    with undisturbed(lmx):
        for point in QUIET_POINTS:
            (site / "point").write_text(f"raise {point}")
            for _ in deadline(PATIENCE_S):
                lmx.status()
                if not (site / "point").exists():
                    break
            else:
                unreached.append(point)
        victim = lmx.model("second")
        os.kill(victim["pid"], signal.SIGKILL)
        lmx.wait_model("second", other_than=victim["incarnation"])
        assert ask(lmx.url, "second").wait().whole
        lmx.wait_status(lambda doc: all(m["memory_bytes"] for m in doc["models"]))
    assert unreached == []
    assert lmx.process.poll() is None
    assert (gateway_of(lmx)["pid"], lmx.model(OTHER)["pid"]) == (gateway["pid"], other["pid"])
    assert len(made_up(log, seen)) >= len(QUIET_POINTS), "somebody was not told"


@pytest.mark.parametrize("point", RAISE_POINTS)
def test_row_51_exception_while_a_process_ends_and_starts(stage: Stage, site: Path, point: str) -> None:
    lmx = stage.lmx
    log, gateway, other = lmx.home / "logs" / "supervisor.log", gateway_of(lmx), lmx.model(OTHER)
    seen, victim = log.stat().st_size, lmx.model("second")
    with undisturbed(lmx):
        (site / "point").write_text(f"raise {point}")
        os.kill(victim["pid"], signal.SIGKILL)
        lmx.wait_model("second", other_than=victim["incarnation"])
        assert ask(lmx.url, "second").wait().whole
    assert not (site / "point").exists(), "the point was never reached"
    assert (gateway_of(lmx)["pid"], lmx.model(OTHER)["pid"]) == (gateway["pid"], other["pid"])
    assert made_up(log, seen)


def made_up(log: Path, seen: int) -> list[dict[str, Any]]:
    """Return what the supervisor logged of our exceptions since; never their text."""
    with log.open("rb") as stream:
        stream.seek(seen)
        told = [json.loads(line) for line in stream.read().splitlines() if b"RuntimeError" in line]
    assert "made up by a test" not in str(told)
    assert all(entry["level"] == "ERROR" for entry in told)
    return told


def test_row_51_the_supervisor_still_pings_after_an_exception(tiny_model: Path, tmp_path: Path) -> None:
    """A beat that raises once must not be the last: workers without pings end after their lease."""
    site = tmp_path / "site"
    settings = patched(site, supervisor=SUPERVISOR_PATCH)
    with stage_of(tiny_model, LMX_LIFECYCLE__LEASE_S="2.5", **settings) as stage:
        before, gateway = pids(stage.lmx), gateway_of(stage.lmx)
        with undisturbed(stage.lmx):
            (site / "point").write_text("raise ping")
            for _ in deadline(PATIENCE_S):
                if not (site / "point").exists():
                    break
            else:
                raise AssertionError("nobody was pinged")
            time.sleep(4.0)  # longer than the lease: what must not happen has had its time
        assert (pids(stage.lmx), gateway_of(stage.lmx)["pid"]) == (before, gateway["pid"])


# -- the end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_tree", [False, True])
def test_row_52_sigterm(tiny_model: Path, figure: Figure, whole_tree: bool) -> None:
    # Long enough that nobody who is only slow is killed, and that nobody waits for the end of it in vain.
    drain = {"LMX_LIFECYCLE__DRAIN_S": "50", "LMX_LIFECYCLE__STOP_MIN_S": "20"}
    with stage_of(tiny_model, **drain) as stage:
        lmx, url = stage.lmx, stage.lmx.url
        load(stage, "second")
        calls = [ask(url, *long, max_tokens=400) for long in LONG for _ in range(3)]
        for call in calls:
            call.wait_chunks(1)
        began = time.time()
        assert lmx.process is not None
        family = lmx.processes()
        for process in family if whole_tree else [psutil.Process(lmx.process.pid)]:
            process.send_signal(signal.SIGTERM)
        event_since(lmx, began, "supervisor_stopping")
        for _ in deadline(PATIENCE_S):  # the gateway has still to hear of it
            late = ask(url).wait()
            if not late.whole:
                break
        assert lmx.process.wait(60) == 0
        what = "all processes told to end" if whole_tree else "told to end, requests for a second"
        figure("row 52", what, time.time() - began, target=5.0)
        assert psutil.wait_procs(family, timeout=PATIENCE_S)[1] == []
        for call in calls:
            call.wait()
            assert call.ends <= 1
            if not whole_tree:
                assert call.whole, repr(call)
            else:
                assert call.whole or call.error or call.broken, repr(call)
        assert late.broken or (late.status, late.code) == (503, "shutting_down")
        assert [e for e in events_since(lmx, began, "process_exited") if e["signal"] == "SIGKILL"] == []
        runtime = state(lmx, "runtime")[1]
        assert (runtime["last_clean_shutdown"], runtime["loaded_models"]) == (True, [OTHER, "second"])
        assert [entry.name for entry in (lmx.home / "run").iterdir() if entry.suffix == ".sock"] == []


# -- the host -----------------------------------------------------------------------------------------------------


def test_row_55_clean_reboot(stage: Stage, figure: Figure) -> None:
    lmx = stage.lmx
    load(stage, "third")
    assert lmx.stop() == 0
    reboot(lmx)
    stage.plans(FaultPlan(load_s=0.5))
    began = time.time()
    lmx.start()
    figure("row 55", "gateway serves after the start", time.time() - began, target=5.0)
    last = ask(lmx.url, "third")
    all_ready(lmx, 3)
    last.wait()
    assert last.whole or (last.status, last.code) == (503, "model_loading"), repr(last)
    starts = [e["model"] for e in events_since(lmx, began, "process_started") if e["model"]]
    assert starts == [OTHER, "second", "third"], "in the order in which they were loaded"
    coming_up = 0
    for entry in events_since(lmx, began):
        coming_up += entry["event"] == "process_started" and bool(entry["model"])
        coming_up -= entry["event"] == "model_readiness_changed" and entry["state"] == "ready"
        assert coming_up <= 1, "one at a time"
    stage.plans()
    lmx.cli("unload", "third")


def test_row_56_power_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a disk has to keep, at each moment of many saves, is a whole old or new document.

    The shim keeps what is certain: a file's content as it was synced, names as they were when the folder was synced,
    then any beginning of the renames since.
    """
    synced: dict[int, bytes] = {}
    names: dict[str, int] = {}
    pending: list[tuple[str, str]] = []
    real_fsync, real_replace = os.fsync, Path.replace
    folder = tmp_path / "state"
    folder.mkdir()
    lost_at: list[tuple[int, dict[str, bytes]]] = []
    number = 0

    def moments() -> None:
        """Write down every disk that a power loss could leave now."""
        for kept in range(len(pending) + 1):
            there = dict(names)
            for old, new in pending[:kept]:
                if old in there:
                    there[new] = there.pop(old)
            lost_at.append((number, {name: synced.get(inode, b"") for name, inode in there.items()}))

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        status = os.fstat(descriptor)
        if Path(f"/proc/self/fd/{descriptor}").resolve() == folder:
            pending.clear()
            names.clear()
            names.update({entry.name: entry.inode() for entry in os.scandir(folder)})
        else:
            file = Path(f"/proc/self/fd/{descriptor}").resolve()
            synced[status.st_ino] = file.read_bytes()
            names.setdefault(file.name, status.st_ino)
            names[file.name] = status.st_ino
        moments()

    def replace(self: Path, target: Path) -> Path:
        moments()
        done = real_replace(self, target)
        pending.append((self.name, target.name))
        moments()
        return done

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    store = StateFile(folder / "desired", kind="lmx.desired", schema=1, sync=fsync)
    for number in range(1, 6):
        store.save({"number": number})
    monkeypatch.undo()
    assert len(lost_at) > 30
    for during, disk in lost_at:
        after = tmp_path / "after"
        after.mkdir()
        for name, content in disk.items():
            (after / name).write_bytes(content)
        found = StateFile(after / "desired", kind="lmx.desired", schema=1).load().payload
        assert (found or {"number": 0})["number"] in {during, during - 1}, disk.keys()
        for file in after.iterdir():
            file.unlink()
        after.rmdir()


def test_row_57_machine_goes_down_while_a_model_loads(tiny_model: Path) -> None:
    """What was being loaded comes last. If a panic was reported it does not come: tests/unit/test_safety.py."""
    with stage_of(tiny_model) as stage:
        lmx = stage.lmx
        load(stage, "suspect", "innocent")
        incarnation = lmx.model("suspect")["incarnation"]
        stage.plans(FaultPlan(models=("suspect",), load_s=30.0))
        with undisturbed(lmx):
            os.kill(lmx.model("suspect")["pid"], signal.SIGKILL)
            lmx.wait_model("suspect", "loading", other_than=incarnation)
        lmx.kill_everything()
        reboot(lmx)
        assert state(lmx, "runtime")[1]["load_mark"] == "suspect"
        stage.plans()
        began = time.time()
        lmx.start()
        all_ready(lmx, 3)
        starts = [e["model"] for e in events_since(lmx, began, "process_started") if e["model"]]
        assert starts == [OTHER, "innocent", "suspect"]


def test_row_58_two_panics_within_a_day(tiny_model: Path) -> None:
    with stage_of(tiny_model) as stage:
        lmx = stage.lmx
        load(stage, "suspect")
        lmx.kill_everything()
        file, desired = state(lmx, "desired")
        now = time.time()
        strikes = [Strike("suspect", now - 3600 * hours, "watchdog timeout") for hours in (20, 1)]
        file.save({**desired, "strikes": msgspec.to_builtins(strikes)})
        reboot(lmx)
        began = time.time()
        lmx.start()
        document = lmx.status()
        assert document is not None
        assert "2 kernel panics" in document["supervisor"]["safe_mode"]
        assert document["models"] == []
        assert httpx.get(f"{lmx.url}/healthz", timeout=PATIENCE_S).status_code == 200
        refused = ask(lmx.url).wait()
        assert refused.status in {404, 503}, repr(refused)
        assert [e for e in events_since(lmx, began, "process_started") if e["model"]] == []
        lmx.cli("resume")
        all_ready(lmx, 2)
        assert ask(lmx.url, "suspect").wait().whole


def test_row_59_sleep_and_wake(tiny_model: Path) -> None:
    """All processes stand still, far beyond every deadline, and go on: nobody hangs, nothing is replaced."""
    short = {"HEARTBEAT_LATE_S": "0.6", "HEARTBEAT_HUNG_S": "2", "GATEWAY_HUNG_S": "2", "SLEPT_S": "1"}
    settings = {f"LMX_LIFECYCLE__{key}": value for key, value in {**short, "LEASE_S": "2.5"}.items()}
    with stage_of(tiny_model, **settings) as stage:
        lmx, url = stage.lmx, stage.lmx.url
        load(stage, "second")
        before, gateway, family, since = pids(lmx), gateway_of(lmx), lmx.processes(), time.time()
        with undisturbed(lmx):
            calls = [ask(url, *long, max_tokens=1500) for long in LONG]
            for call in calls:
                call.wait_chunks(1)
            for process in family:
                process.suspend()
            time.sleep(4.0)  # asleep
            for process in family:
                process.resume()
            event_since(lmx, since, "slept")
            for call in calls:
                assert call.wait().whole, repr(call)
            assert ask(url, "second").wait().whole
        assert (pids(lmx), gateway_of(lmx)["pid"]) == (before, gateway["pid"])
        assert events_since(lmx, since, "hung") == []
        assert events_since(lmx, since, "process_exited") == []


@pytest.mark.parametrize("years", [10, -10])
def test_row_60_wall_clock_jumps(stage: Stage, site: Path, years: int) -> None:
    lmx = stage.lmx
    before, gateway = pids(lmx), gateway_of(lmx)
    offset = years * 365.25 * 86400
    with undisturbed(lmx):
        lmx.kill_supervisor()
        (site / "clock").write_text(str(offset))
        lmx.start()
        all_ready(lmx, 2)
        assert (pids(lmx), gateway_of(lmx)["pid"]) == (before, gateway["pid"])
        victim = lmx.model("second")
        os.kill(victim["pid"], signal.SIGKILL)
        lmx.wait_model("second", other_than=victim["incarnation"])
        assert ask(lmx.url, "second").wait().whole
        document = lmx.status()
        assert document is not None
        assert document["supervisor"]["safe_mode"] is None
        assert 0 <= document["supervisor"]["uptime_s"] < 600
        # And back again.
        lmx.kill_supervisor()
        (site / "clock").unlink()
        snapshot = json.loads(lmx.cli("status", "--json", check=False).stdout)
        assert snapshot["snapshot_age_s"] >= 0
        lmx.start()
        all_ready(lmx, 2)
    assert lmx.model(OTHER)["pid"] == before[OTHER]


def test_row_60_starts_in_the_future_are_no_crash_loop() -> None:
    now, config = 1_800_000_000.0, LifecycleConfig()
    assert not crash_loop_of_supervisor((now + 5, now + 10, now + 3e8), now, config)
    assert not crash_loop_of_supervisor((now - 3e8, now - 3e8, now), now, config)
    assert crash_loop_of_supervisor((now - 20, now - 10, now), now, config)
