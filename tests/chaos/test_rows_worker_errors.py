"""Rows of the failure matrix: what Metal and MLX say when they fail (recorded words, workers without MLX)."""

import json
import signal
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.chaos.figures import Figure
from tests.chaos.scene import FAIL, PATIENCE_S, Scene, Stage, Victim, counted, logged
from tests.harness import deadline
from worker.failures import FatalError
from worker.loading import Canary

METAL = "[METAL] Command buffer execution failed: "
OOM = METAL + "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
TIMEOUT = METAL + "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)"
INTERACTIVITY = METAL + "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"
IGNORED = (
    METAL
    + "Ignored (for causing prior/excessive GPU errors) (00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)"
)
VICTIM = METAL + "Discarded (victim of GPU error/recovery) (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)"
CANARY_S = 1.0
LIMIT = "[metal::malloc] Resource limit (499000) exceeded."


@pytest.fixture(scope="module")
def stage(new_stage: Callable[..., Stage]) -> Stage:
    return new_stage(LMX_LIFECYCLE__HEARTBEAT_S="0.1", LMX_LIFECYCLE__CANARY_IDLE_S=str(CANARY_S))


def fail_once(scene: Scene, figure: Figure, row: str, code: int, kind: str, number: int = 0) -> Victim:
    """Have the victim raise its words during an answer; assert class, code and what client and operator see."""
    victim = scene.victim()
    # 0.3 s, so that heartbeats have told of it; each time another request, or it would be refused as the culprit.
    doomed = scene.ask(f"[[raise 15]] {number}", headers=FAIL).wait()
    exited = scene.exited(victim)
    figure(row, "exit after the words", exited["seen_at"] - doomed.chunks_at[-1], target=1)
    assert exited["seen_at"] - doomed.chunks_at[-1] < 15, "well before a step that hangs would be noticed"
    assert (exited["code"], exited["exit_class"]) == (code, kind)
    assert (doomed.code, doomed.error["type"]) == ("worker_crashed", "server_error")
    last = scene.lmx.model(scene.model)["last_exit"]
    assert last["class"] == kind
    assert last["hint"]
    crash = scene.crash(victim.incarnation, named=True)
    assert (crash["class"], crash["phase"]) == (kind, "decode")
    return victim


@pytest.mark.parametrize(
    ("row", "words", "code", "kind"),
    [
        pytest.param("row-13", OOM, 87, "metal_oom", id="row_13_metal_oom"),
        pytest.param("row-14", TIMEOUT, 86, "gpu_timeout", id="row_14_gpu_timeout"),
        pytest.param("row-14-b", INTERACTIVITY, 86, "gpu_interactivity", id="row_14_interactivity"),
        pytest.param("row-17", LIMIT, 88, "resource_limit", id="row_17_resource_limit"),
    ],
)
def test_row_13_14_17_degraded_retry(stage: Stage, figure: Figure, row: str, words: str, code: int, kind: str) -> None:
    with stage.scene(row) as scene:
        scene.loaded(words=words, tokens_per_s=50.0)
        victim = fail_once(scene, figure, row[:6].replace("-", " "), code, kind)
        exited = scene.exited(victim)
        ready = scene.ready_after(victim, within_s=90)
        figure(row[:6].replace("-", " "), "ready again, degraded", ready["ts"] - exited["ts"], target=5)
        now = scene.lmx.model(row)
        assert now["degraded"]
        spec = json.loads(next((scene.lmx.home / "run").glob(f"{row}-*.{now['incarnation']}.json")).read_text())
        assert (spec["models"]["max_concurrent_requests"], spec["models"]["prefill_step_tokens"]) == (1, 128)
        scene.serves()


def test_row_13_last_words_reach_a_supervisor_that_was_busy(stage: Stage) -> None:
    """Its words and its end are both there when the supervisor looks: the words must not be thrown away."""
    with stage.scene("row-13-b") as scene:
        victim = scene.loaded(words=OOM, tokens_per_s=50.0)
        assert stage.lmx.process is not None
        stage.lmx.process.send_signal(signal.SIGSTOP)
        try:
            scene.ask("[[raise 15]]", headers=FAIL).wait()
            for _ in deadline(PATIENCE_S):
                if psutil.Process(victim.pid).status() == psutil.STATUS_ZOMBIE:
                    break
            else:
                raise AssertionError("it waits for its supervisor")
        finally:
            stage.lmx.process.send_signal(signal.SIGCONT)
        exited = scene.exited(victim)
        assert (exited["code"], exited["exit_class"]) == (87, "metal_oom")
        assert "kIOGPUCommandBufferCallbackErrorOutOfMemory" in exited["reason"]
        assert scene.crash(victim.incarnation)["phase"] == "decode", "what was said before the last words counts, too"


def test_row_15_submissions_ignored(stage: Stage, figure: Figure) -> None:
    """The system takes nothing more from such a process, and needs a while: it ends at once and waits a minute."""
    with stage.scene("row-15") as scene:
        scene.loaded(words=IGNORED, tokens_per_s=50.0)
        fail_once(scene, figure, "row 15", 86, "gpu_ignored")
        waits = scene.wait_state("backoff")
        assert waits["retry_in_s"] > 30
        assert scene.attempts() == 1


def test_row_16_victim_of_another_process(stage: Stage, figure: Figure) -> None:
    """Any number of them: never set aside, never degraded."""
    with stage.scene("row-16") as scene:
        scene.loaded(words=VICTIM, tokens_per_s=50.0)
        for number in range(4):
            victim = fail_once(scene, figure, "row 16", 86, "gpu_victim", number)
            scene.ready_after(victim)
        model = scene.lmx.model("row-16")
        assert (model["state"], model["degraded"]) == ("ready", False)
        scene.serves()
        assert not [e for e in scene.events("model_readiness_changed") if e["state"] == "quarantined"]


def test_row_18_silent_wrong_output(stage: Stage, figure: Figure, tmp_path: Path) -> None:
    """A backend whose output is all zeros says nothing; the canary of an idle model finds it."""
    tokens = iter([[5], [5], [0]])
    canary = Canary(SimpleNamespace(generate=lambda _prompt, max_tokens: next(tokens)), 100)  # type: ignore[arg-type]
    canary()
    canary()
    with pytest.raises(FatalError) as caught:
        canary()
    with stage.scene("row-18") as scene:
        once = str(tmp_path / "once")
        code, words = caught.value.code, caught.value.message
        victim = scene.loaded(at="idle", deed="exit", exit_code=int(code), words=words, once=once)
        ready = scene.event("model_readiness_changed", state="ready")
        exited = scene.exited(victim)
        figure("row 18", "found after ready, a canary each second", exited["seen_at"] - ready["ts"], target=2)
        assert exited["seen_at"] - ready["ts"] < CANARY_S + 20, "not after the minute of production"
        assert exited["exit_class"] == "canary_mismatch"
        scene.ready_after(victim)
        scene.serves()


def test_row_19_thread_dies_and_the_process_lives(stage: Stage, figure: Figure) -> None:
    with stage.scene("row-19") as scene:
        victim = scene.loaded()
        running = scene.ask("[[tokens 5000]]", max_tokens=5000, headers=FAIL).wait_chunks(3)
        fatal = scene.ask("[[io]]", headers=FAIL)
        exited = scene.exited(victim)
        assert (exited["code"], exited["exit_class"]) == (70, "thread_died")
        log = next((scene.lmx.home / "logs").glob("row-19-*.log"))
        for _ in deadline(PATIENCE_S):
            died = logged(log, "thread_died")
            if died:
                break
        died_at = datetime.fromisoformat(died[0]["ts"]).timestamp()
        figure("row 19", "end seen after the thread died", exited["seen_at"] - died_at, target=0.1)
        figure("row 19", "end seen after the request was sent", exited["seen_at"] - fatal.sent_at)
        assert exited["seen_at"] - died_at < 10, "well before its heartbeats would be missed"
        assert died[0]["thread"] == "io"
        for call in (running, fatal):
            assert call.wait().code == "worker_crashed"
        scene.ready_after(victim)
        scene.serves()


def test_row_36_query_of_death(stage: Stage, figure: Figure) -> None:
    """One request ends its model's process whenever it runs; those beside it are innocent."""
    with stage.scene("row-36") as scene:
        scene.loaded(tokens_per_s=100.0)
        innocents = [scene.ask(f"[[tokens {100 + number}]]", max_tokens=1000) for number in range(4)]
        for call in innocents:
            call.wait_chunks(1)
        culprit = scene.ask("[[abort 3]]", stream_options={"include_usage": True})
        for number, call in enumerate(innocents):
            assert call.wait().whole, repr(call)
            assert call.text == counted(100 + number)
        culprit.wait()
        assert culprit.code in {"request_quarantined", "worker_crashed"}
        crashes = [e for e in scene.events("process_exited") if e["model"] == "row-36" and e["signal"] == "SIGABRT"]
        figure("row 36", "crashes of one digest", len(crashes), target=2, unit="")
        assert len(crashes) == 2
        for _ in range(3):
            again = scene.ask("[[abort 3]]").wait()
            assert (again.status, again.code) == (422, "request_quarantined")
        assert not scene.ask("[[abort 4]]", max_tokens=3).wait().error, "another request, and it ends before its fault"
        named = logged(scene.lmx.home / "logs" / "gateway.log", "request_quarantined")
        assert [len(line["digest"]) for line in named if line["model"] == "row-36"] == [8]
        scene.serves()
        assert scene.attempts() == 3
