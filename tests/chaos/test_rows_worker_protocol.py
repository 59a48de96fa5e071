"""Rows of the failure matrix: a worker that sends what no worker may send (workers without MLX)."""

import threading
from collections.abc import Callable

import psutil
import pytest

from tests.chaos.figures import Figure
from tests.chaos.scene import FAIL, PATIENCE_S, Stage, counted, logged
from tests.harness import deadline

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def stage(new_stage: Callable[..., Stage]) -> Stage:
    return new_stage()


class Peak:
    """The largest memory of the gateway while this is open, against what it had before."""

    def __init__(self, stage: Stage) -> None:
        document = stage.lmx.status()
        assert document is not None
        self._process = psutil.Process(document["gateway"]["pid"])
        self._stop = threading.Event()
        self._before = self._largest = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def grown(self) -> float:
        """MiB."""
        return (self._largest - self._before) / MIB

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._largest = max(self._largest, self._process.memory_info().rss)


@pytest.mark.parametrize("word", ["flood", "huge"])
def test_row_30_worker_floods_or_sends_a_huge_frame(stage: Stage, figure: Figure, word: str) -> None:
    with stage.scene(f"row-30-{word}") as scene:
        scene.loaded()
        scene.serves()
        with Peak(stage) as peak:
            call = scene.ask(f"[[{word}]]", headers=FAIL).wait()
        figure("row 30", f"gateway's memory grew ({word})", peak.grown, target=50, unit="MiB")
        assert peak.grown < 50
        assert call.whole or call.code in {"protocol_error", "worker_crashed"}, repr(call)
        for _ in deadline(PATIENCE_S):  # the link was cut; it is made again
            again = scene.ask(max_tokens=3).wait()
            if again.whole:
                break
        assert again.text == counted(3)


def test_row_31_wrong_incarnation_is_dropped_and_counted(stage: Stage) -> None:
    with stage.scene("row-31") as scene:
        victim = scene.loaded()
        for _ in range(3):
            call = scene.ask("[[wrong]]", max_tokens=5).wait()
            assert (call.whole, call.text) == (True, counted(5))
        dropped = gateway_events(stage, "protocol_error")
        assert dropped
        assert {entry["why"] for entry in dropped if entry["model"] == "row-31"} == {"wrong_incarnation"}
        assert scene.victim().pid == victim.pid


@pytest.mark.parametrize("word", ["garbage", "twice"])
def test_row_31_nonsense_ends_the_process_after_three(stage: Stage, word: str) -> None:
    with stage.scene(f"row-31-{word}") as scene:
        victim = scene.loaded()
        # Of one request only the first wrong answer counts: then nobody waits for others about it.
        for _ in range(3 if word == "twice" else 1):
            call = scene.ask(f"[[{word}]]", headers=FAIL).wait()
            assert call.code == "protocol_error", repr(call)
        assert [e for e in gateway_events(stage, "protocol_error") if e["model"] == f"row-31-{word}"]
        exited = scene.exited(victim)
        assert exited["exit_class"] == "protocol_error"
        scene.ready_after(victim)
        scene.serves()


def gateway_events(stage: Stage, name: str) -> list[dict[str, object]]:
    return logged(stage.lmx.home / "logs" / "gateway.log", name)
