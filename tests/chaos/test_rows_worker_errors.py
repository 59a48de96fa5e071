"""Rows of the failure matrix: what Metal and MLX say when they fail (recorded words, workers without MLX)."""

import json
from collections.abc import Callable

import pytest

from tests.chaos.figures import Figure
from tests.chaos.scene import FAIL, Scene, Stage, Victim
from tests.harness import deadline

METAL = "[METAL] Command buffer execution failed: "
OOM = METAL + "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
TIMEOUT = METAL + "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)"
INTERACTIVITY = METAL + "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"
IGNORED = (
    METAL
    + "Ignored (for causing prior/excessive GPU errors) (00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)"
)
VICTIM = METAL + "Discarded (victim of GPU error/recovery) (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)"
LIMIT = "[metal::malloc] Resource limit (499000) exceeded."


@pytest.fixture(scope="module")
def stage(new_stage: Callable[..., Stage]) -> Stage:
    return new_stage(
        LMX_LIFECYCLE__BURST_FAILURES="9", LMX_LIFECYCLE__DEGRADED_FROM_TRY="9", LMX_LIFECYCLE__HEARTBEAT_S="0.1"
    )


def fail_once(scene: Scene, figure: Figure, row: str, code: int, kind: str) -> Victim:
    """Have the victim raise its words during an answer; assert class, code and what client and operator see."""
    victim = scene.victim()
    doomed = scene.ask("[[raise 15]]", headers=FAIL).wait()  # 0.3 s: heartbeats have told of it
    exited = scene.exited(victim)
    figure(row, "exit after the words", exited["seen_at"] - doomed.chunks_at[-1], target=1)
    assert exited["seen_at"] - doomed.chunks_at[-1] < 1.5
    assert (exited["code"], exited["exit_class"]) == (code, kind)
    assert (doomed.code, doomed.error["type"]) == ("worker_crashed", "server_error")
    last = scene.lmx.model(scene.model)["last_exit"]
    assert last["class"] == kind
    assert last["hint"]
    crash = scene.crash(victim.incarnation)
    assert (crash["class"], crash["phase"]) == (kind, "decode")
    assert crash["requests"]
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
        for _ in range(4):
            victim = fail_once(scene, figure, "row 16", 86, "gpu_victim")
            scene.ready_after(victim)
        model = scene.lmx.model("row-16")
        assert (model["state"], model["degraded"]) == ("ready", False)
        scene.serves()
        assert not [e for e in scene.events("model_readiness_changed") if e["state"] == "quarantined"]


def test_row_19_thread_dies_and_the_process_lives(stage: Stage, figure: Figure) -> None:
    with stage.scene("row-19") as scene:
        victim = scene.loaded()
        running = scene.ask("[[tokens 5000]]", max_tokens=5000, headers=FAIL).wait_chunks(3)
        fatal = scene.ask("[[io]]", headers=FAIL)
        exited = scene.exited(victim)
        assert (exited["code"], exited["exit_class"]) == (70, "thread_died")
        log = next((scene.lmx.home / "logs").glob("row-19-*.log"))
        for _ in deadline(5):
            died = [json.loads(line) for line in log.read_text().splitlines() if '"thread_died"' in line]
            if died:
                break
        figure("row 19", "exit after the thread died", exited["ts"] - fatal.sent_at, target=0.1)
        assert exited["ts"] - fatal.sent_at < 0.5
        assert died[0]["thread"] == "io"
        for call in (running, fatal):
            assert call.wait().code == "worker_crashed"
        scene.ready_after(victim)
        scene.serves()
