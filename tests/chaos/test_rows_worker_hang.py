"""Rows of the failure matrix: a worker that lives and does nothing, or does not end (deadlines scaled down)."""

import signal
import time
from collections.abc import Callable

import psutil
import pytest

from protocol import control
from tests.chaos.figures import Figure
from tests.chaos.scene import FAIL, Stage

LATE_S = 0.6
HUNG_S = 2.8
#: Longer, so that a process which does nothing at all is found by its heartbeats.
STEP_S = 3.8
#: A supervisor that stood still for longer judges nobody by that time.
SLEPT_S = 1.0
#: How much later than its deadline a hang may be found: before the deadlines of production.
SLACK_S = 10.0
GRACE_S = 1.0
#: Codes of a request whose process was ended for doing nothing.
TOLD = {"worker_crashed", "timeout", "model_restarting"}


@pytest.fixture(scope="module")
def stage(new_stage: Callable[..., Stage]) -> Stage:
    return new_stage(
        LMX_LIFECYCLE__HEARTBEAT_S="0.1",
        LMX_LIFECYCLE__HEARTBEAT_LATE_S=str(LATE_S),
        LMX_LIFECYCLE__HEARTBEAT_HUNG_S=str(HUNG_S),
        LMX_LIFECYCLE__SLEPT_S=str(SLEPT_S),
        LMX_LIFECYCLE__DECODE_S=str(STEP_S),
        LMX_LIFECYCLE__PREFILL_S=str(STEP_S),
    )


@pytest.mark.parametrize("at", [0, 5])
def test_row_20_hang_with_the_gil_free(stage: Stage, figure: Figure, at: int) -> None:
    """In prefill and in decode; the IO thread goes on to send heartbeats."""
    with stage.scene(f"row-20-{at}") as scene:
        victim = scene.loaded()
        call = scene.ask(f"[[freeze {at}]]", headers=FAIL)
        hung = scene.event("hung")
        figure("row 20", "found after its deadline", hung["ts"] - call.sent_at - STEP_S, target=1)
        assert hung["ts"] - call.sent_at < STEP_S + SLACK_S
        assert ("decode" if at else "prefill") in hung["reason"]
        call.wait()
        assert call.code in TOLD
        exited = scene.exited(victim)
        assert exited["exit_class"] == "hang"
        figure("row 20", "replaced after it was found", scene.ready_after(victim)["ts"] - hung["ts"], target=5)
        scene.serves()
        stacks = scene.crash(victim.incarnation)["stacks.txt"]
        assert "most recent call first" in stacks
        assert "tests/fault/" in stacks


def test_row_21_hang_that_keeps_the_gil(stage: Stage, figure: Figure) -> None:
    with stage.scene("row-21") as scene:
        victim = scene.loaded()
        call = scene.ask("[[seize 3]]", headers=FAIL)
        hung = scene.event("hung")
        assert "heartbeat" in hung["reason"]
        figure("row 21", "found after its deadline", hung["ts"] - call.sent_at - HUNG_S, target=1)
        assert hung["ts"] - call.sent_at < HUNG_S + SLACK_S
        call.wait()
        assert call.code in TOLD
        assert scene.exited(victim)["exit_class"] == "hang"
        scene.ready_after(victim)
        scene.serves()
        # faulthandler needs no GIL: the dump names the line that sits on it.
        assert "in commit" in scene.crash(victim.incarnation)["stacks.txt"]


def test_row_22_sigstop_and_sigcont_before_the_deadline(stage: Stage, figure: Figure) -> None:
    with stage.scene("row-22") as scene:
        victim = scene.loaded(tokens_per_s=50.0, answer_tokens=500)
        call = scene.ask(max_tokens=100).wait_chunks(1)
        stopped_at = victim.signal(signal.SIGSTOP)
        late = scene.event("heartbeat_late")
        assert scene.lmx.model("row-22")["heartbeat_late"]
        victim.signal(signal.SIGCONT)
        figure("row 22", "suspected after its deadline", late["ts"] - stopped_at - LATE_S, target=1)
        scene.lmx.wait_status(lambda doc: not any(m["heartbeat_late"] for m in doc["models"]))
        call.wait()
        assert call.whole
        now = scene.victim()
        assert (now.pid, now.incarnation) == (victim.pid, victim.incarnation)
        assert scene.events("hung") == []


def test_row_22_sigstop_for_good(stage: Stage, figure: Figure) -> None:
    with stage.scene("row-22-b") as scene:
        victim = scene.loaded()
        scene.serves()
        stopped_at = victim.signal(signal.SIGSTOP)
        call = scene.ask()  # taken by nobody, so that it goes to the next process
        hung = scene.event("hung")
        assert "heartbeat" in hung["reason"]
        figure("row 22", "SIGSTOP found after its deadline", hung["ts"] - stopped_at - HUNG_S, target=1)
        assert hung["ts"] - stopped_at < HUNG_S + SLACK_S
        assert scene.exited(victim)["exit_class"] == "hang"
        scene.ready_after(victim)
        assert call.wait().whole, repr(call)
        scene.serves()


def test_row_23_worker_that_ignores_sigterm(stage: Stage, figure: Figure) -> None:
    with stage.scene("row-23") as scene:
        victim = scene.loaded(ignore_sigterm=True, tokens_per_s=50.0)
        call = scene.ask("[[freeze]]", headers=FAIL)
        scene.lmx.wait_status(lambda doc: any(m["id"] == "row-23" and m["running"] for m in doc["models"]))
        asked_at = time.time()
        scene.command(control.RestartRequest("row-23", force=True))
        exited = scene.exited(victim)
        figure("row 23", "killed after its grace", exited["ts"] - asked_at - GRACE_S, target=0.5)
        assert GRACE_S <= exited["ts"] - asked_at < GRACE_S + SLACK_S
        assert (exited["signal"], exited["state"]) == ("SIGKILL", "stopping")
        assert not psutil.pid_exists(victim.pid)
        call.wait()
        assert call.error
        scene.wait_state("ready")
        scene.serves()
