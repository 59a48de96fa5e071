"""Rows of the failure matrix: a worker process that dies (workers without MLX)."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import psutil
import pytest

from protocol.config import LifecycleConfig
from protocol.paths import Home
from supervisor.adoption import living
from supervisor.exits import classify
from supervisor.platform import current_platform
from supervisor.platform.reports import jetsam_pids
from supervisor.restarts import History, after_failure, worker_policy
from supervisor.screen import status_text
from supervisor.store import Store
from tests.chaos.figures import Figure
from tests.chaos.scene import OTHER, PATIENCE_S, Others, Stage, counted, load_mark
from tests.fault.pipe import Pipe
from tests.harness import Lmx, deadline

CORPUS = Path(__file__).resolve().parents[1] / "corpus" / "crashes"


@pytest.fixture(scope="module")
def stage(new_stage: Callable[..., Stage]) -> Stage:
    return new_stage()


def test_row_05_sigkill_of_unknown_sender(stage: Stage, figure: Figure) -> None:
    with stage.scene("row-05") as scene:
        victim = scene.loaded()
        killed_at = victim.signal(signal.SIGKILL)
        exited = scene.exited(victim)
        assert (exited["exit_class"], exited["signal"]) == ("killed", "SIGKILL")
        figure("row 05", "death seen", exited["seen_at"] - killed_at, target=0.05)
        scene.ready_after(victim)
        scene.serves()
    # With a report of the system that names the process it is jetsam, without one it is not: recorded samples.
    report = (CORPUS / "jetsam_many.ips").read_text(encoding="utf-8")
    pids = jetsam_pids(report)
    assert pids
    classes = {
        classify(-9, at=1.0, asked=False, hung=False, jetsam=pid in pids).name: pid in pids for pid in (*pids, 1)
    }
    assert classes == {"jetsam": True, "killed": False}


@pytest.mark.parametrize(("row", "at"), [("row-06", "import"), ("row-08", "warming")])
def test_row_06_and_08_crash_before_ready(stage: Stage, figure: Figure, tmp_path: Path, row: str, at: str) -> None:
    with stage.scene(row) as scene, Pipe(tmp_path / "pipe") as pipe, ThreadPoolExecutor(1) as thread:
        scene.fault(at=at, deed="abort", warming_pipe=str(pipe.file) if at == "warming" else "")
        began = time.time()
        loading, incarnation = thread.submit(scene.load, check=False), 0
        for _ in range(3 if at == "warming" else 0):  # each dies once it is known to be warming
            scene.lmx.wait_model(row, "warming", other_than=incarnation)
            incarnation = scene.lmx.model(row)["incarnation"]
            pipe.let()
        assert loading.result(60).exit_code == 1
        set_aside = scene.event("model_readiness_changed", state="quarantined")
        assert set_aside["ts"] - began < 40
        figure(row.replace("-", " "), "set aside", set_aside["ts"] - began, target=10)
        assert scene.attempts() == 3
        phases = [e["state"] for e in scene.events("process_exited") if e["model"] == row]
        assert phases == ["starting" if at == "import" else "warming"] * 3
        refused = scene.ask().wait()
        assert (refused.status, refused.code) == (503, "model_quarantined")
        assert int(refused.headers["retry-after"]) >= 1
        assert "3 times in a row" in scene.lmx.model(row)["reason"]
        crash = scene.crash(scene.lmx.model(row)["incarnation"])
        assert crash["signal"] == "SIGABRT"
        assert crash["phase"] == ("starting" if at == "import" else "warming")


def test_row_07_crash_while_loading_weights(stage: Stage, figure: Figure, tmp_path: Path) -> None:
    with stage.scene("row-07") as scene, Pipe(tmp_path / "pipe") as pipe:
        scene.fault(load_pipe=str(pipe.file))
        loading = scene.loading()
        # It has said how much there is to load, so it has read what it has to do.
        scene.lmx.wait_status(
            lambda doc: any(m["id"] == "row-07" and m["progress"]["total_bytes"] for m in doc["models"])
        )
        victim = scene.victim()
        assert load_mark(scene.lmx) == "row-07"
        waiting = scene.ask()
        scene.fault()
        killed_at = victim.signal(signal.SIGKILL)
        exited = scene.exited(victim)
        assert exited["state"] == "loading"
        figure("row 07", "death seen", exited["seen_at"] - killed_at, target=0.05)
        ready = scene.ready_after(victim)
        figure("row 07", "ready again", ready["ts"] - killed_at, target=5)
        loading.join(30)
        scene.serves()
        assert scene.left_of(victim) == []
        assert not list((scene.lmx.home / "run").glob("*.tmp"))
        assert scene.crash(victim.incarnation)["phase"] == "loading"
        for _ in deadline(PATIENCE_S):
            if load_mark(scene.lmx) == "":
                break
        else:
            raise AssertionError("the mark outlives the load")
        # Held until it serves, or told that it loads: never anything else.
        waiting.wait()
        assert waiting.whole or (waiting.status, waiting.code) == (503, "model_loading")


def test_row_09_crash_loop_after_ready(stage: Stage, figure: Figure) -> None:
    with stage.scene("row-09") as scene:
        scene.fault(after_ready_s=0.3, deed="abort")
        scene.load(check=False)
        set_aside = scene.event("model_readiness_changed", state="quarantined")
        assert scene.attempts() <= 5
        figure("row 09", "starts before it is set aside", scene.attempts(), target=5, unit="")
        model = scene.lmx.model("row-09")
        assert (model["last_exit"]["class"], model["last_exit"]["signal"]) == ("native_crash", "SIGABRT")
        assert model["last_exit"]["hint"]
        assert "within" in set_aside["reason"]
        refused = scene.ask().wait()
        assert (refused.status, refused.code) == (503, "model_quarantined")
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        assert stage.lmx.process is not None
        supervisor = psutil.Process(stage.lmx.process.pid)
        before, since = supervisor.cpu_times(), time.monotonic()
        time.sleep(1.0)  # the measurement itself
        after = supervisor.cpu_times()
        share = (after.user + after.system - before.user - before.system) / (time.monotonic() - since)
        figure("row 09", "processor share of the supervisor afterwards", share * 100, target=5, unit="%")
        assert share < 0.05, "it tries again without pause"
        assert scene.attempts() <= 5


def test_row_10_slow_crash_loop() -> None:
    """A model that takes 200 s to load and dies 30 s later: no window of a minute would ever see it."""
    policy = worker_policy(LifecycleConfig())
    history, now, verdicts = History(), 0.0, []
    for _ in range(5):
        now += 200 + 30
        verdict = after_failure(policy, history, now=now, ready_for_s=30, load_s=200, luck=0)
        history = verdict.history
        verdicts.append(verdict.why)
        now += verdict.delay_s
    assert now - 230 > policy.slow_s, "the plain window of ten minutes is too short for it"
    assert verdicts[:4] == [None] * 4
    assert verdicts[4] is not None


def test_row_29_descriptor_leak_in_a_worker(stage: Stage, figure: Figure) -> None:
    with stage.scene("row-29") as scene:
        victim = scene.loaded()
        psutil.Process(victim.pid).rlimit(psutil.RLIMIT_NOFILE, (64, 64))
        doomed = scene.ask("[[leak]]", headers={"X-LMX-On-Crash": "fail"})
        exited = scene.exited(victim)
        figure("row 29", "dies alone", exited["ts"] - doomed.sent_at, target=5)
        assert exited["exit_class"] == "resource_limit"
        assert doomed.wait().code == "worker_crashed"
        scene.ready_after(victim)
        scene.serves()
        assert "Too many open files" in scene.lmx.model("row-29")["last_exit"]["reason"]


def test_row_32_worker_forks_a_child_and_dies(stage: Stage, figure: Figure) -> None:
    def group() -> list[int]:
        """Return the living processes of the victim's group."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) == victim.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except (psutil.Error, ProcessLookupError):
                continue
        return found

    with stage.scene("row-32") as scene:
        victim = scene.loaded()
        scene.ask("[[fork]]", headers={"X-LMX-On-Crash": "fail"})
        exited = scene.exited(victim)
        for _ in deadline(PATIENCE_S):
            if not group():
                break
        assert group() == [], "the child would have lived for 300 s"
        figure("row 32", "nothing left of the group", time.time() - exited["ts"], target=1)
        scene.ready_after(victim)
        scene.serves()


def test_row_34_crash_while_another_model_loads(stage: Stage, tmp_path: Path) -> None:
    with stage.scene("row-34") as scene, Pipe(tmp_path / "pipe") as pipe:
        victim = scene.loaded()
        scene.fault(models=("row-34-b",), load_pipe=str(pipe.file))
        loading = scene.loading("row-34-b")
        scene.lmx.wait_model("row-34-b", "loading")
        victim.signal(signal.SIGABRT)
        exited = scene.exited(victim)
        waits = scene.lmx.model("row-34")
        assert waits["state"] in {"backoff", "starting"}
        assert waits["pid"] is None
        pipe.let()
        scene.ready_after(victim)
        loading.join(30)
        coming_up: set[str] = set()
        for entry in scene.events():
            if entry["event"] == "process_started":
                coming_up.add(entry["model"])
            elif entry["event"] == "model_readiness_changed" and entry["state"] in {"ready", "backoff", "quarantined"}:
                coming_up.discard(entry["model"])
            assert len(coming_up) <= 1, scene.events()
        ready_b = scene.event("model_readiness_changed", model="row-34-b", state="ready")
        assert scene.started_after(victim)["ts"] >= ready_b["ts"] > exited["ts"]
        scene.serves()


def test_row_35_four_workers_die_at_once(new_stage: Callable[..., Stage], figure: Figure) -> None:
    stage = new_stage(
        LMX_LIFECYCLE__BREAKER_FAILURES="4",
        LMX_LIFECYCLE__BREAKER_OPEN_S="6",
        LMX_LIFECYCLE__BREAKER_START_EVERY_S="3",
    )
    with stage.scene("row-35") as scene:
        names = ["row-35", "row-35-b", "row-35-c", "row-35-d"]
        for name in names:
            scene.load(name)
        for name in names:
            os.killpg(scene.victim(name).pid, signal.SIGKILL)
        opened = scene.lmx.wait_event("host_breaker_open", seconds=6.0)
        document = scene.lmx.status()
        assert document is not None
        assert document["supervisor"]["host_breaker_open_s"] > 0
        assert "HOST BREAKER" in status_text(document)
        scene.lmx.wait_status(lambda doc: all(m["state"] == "ready" for m in doc["models"]))
        starts = [e["ts"] for e in scene.events("process_started") if e["ts"] > opened["ts"]]
        # What is written down may be a moment late, at the beginning and at the end.
        early = [at - opened["ts"] for at in starts if at < opened["ts"] + 5]
        assert len(early) <= 2
        gaps = [later - earlier for earlier, later in itertools.pairwise(early)]
        assert all(gap > 1.5 for gap in gaps)
        figure("row 35", "starts while it is open (6 s, one each 3 s)", len(early), target=2, unit="")
        for name in names:
            assert scene.ask(model=name, max_tokens=3).wait().text == counted(3)


def test_row_33_pid_reused(stage: Stage) -> None:
    """A record of a worker whose pid belongs to somebody else by now: nobody signals the stranger."""
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    lmx = Lmx(LMX_WORKER__MODULE="tests.fault", LMX_LIFECYCLE__STOP_MIN_S="0.2")
    try:
        lmx.start()
        lmx.load(stage.folder, "one")
        lmx.load(stage.folder, OTHER)
        with Others(lmx):
            worker = lmx.model("one")["pid"]
            lmx.kill_supervisor()
            os.kill(worker, signal.SIGKILL)
            store = Store(Home(lmx.home), current_platform())
            _, runtime = store.load()
            reused = [
                msgspec.structs.replace(child, pid=stranger.pid) if child.model == "one" else child
                for child in runtime.children
            ]
            assert stranger.pid in {child.pid for child in reused}
            store.save_runtime(msgspec.structs.replace(runtime, children=tuple(reused)))
            assert [child.model for child in living(store.load()[1], current_platform())] == ["", OTHER]
            lmx.start()
            assert lmx.wait_model("one") != stranger.pid
        assert stranger.poll() is None
        assert [e for e in lmx.journal() if e["event"] == "process_adopted" and e["pid"] == stranger.pid] == []
        assert lmx.wait_event("stale_identity", pid=stranger.pid)["model"] == "one"
    finally:
        lmx.close()
        alive = stranger.poll() is None
        stranger.kill()
        stranger.wait()
    assert alive
