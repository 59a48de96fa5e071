"""Rows of the failure matrix about memory. Most of them need the ledger, which does not exist yet: see rows.json."""

import os
import signal
import time
from pathlib import Path

from tests.chaos.figures import Figure
from tests.chaos.scene import SETTINGS, Stage
from tests.chaos.test_rows_gateway import ask, event_since, events_since, load, patched, undisturbed
from tests.harness import deadline

RECLAIM_S = 1.5
#: What the system could give, if that stands in a file: the counter of a driver that keeps what it should give back.
AVAILABLE_PATCH = """
import os
from supervisor.platform.linux import Linux
real = Linux.available
def available(self):
    try:
        with open(f"{HERE}/available") as file:
            return int(file.read())
    except FileNotFoundError:
        return real(self)
Linux.available = available
"""


def test_row_25_memory_not_returned_after_death(tiny_model: Path, figure: Figure, tmp_path: Path) -> None:
    site = tmp_path / "site"
    settings = {**SETTINGS, "LMX_LIFECYCLE__RECLAIM_S": str(RECLAIM_S), **patched(site, supervisor=AVAILABLE_PATCH)}
    stage = Stage(tiny_model, **settings)
    lmx = stage.lmx
    try:
        load(stage, "second")
        lmx.wait_status(lambda doc: all(m["memory_bytes"] for m in doc["models"]))
        victim = lmx.model("second")
        with undisturbed(lmx):
            (site / "available").write_text("0")
            killed_at = time.time()
            os.kill(victim["pid"], signal.SIGKILL)
            held = ask(lmx.url, "second")
            blocked = event_since(lmx, killed_at, "memory_not_reclaimed", model="second")
            figure(
                "row 25", "said that memory is missing, limit 1.5 s", blocked["ts"] - killed_at, target=RECLAIM_S + 1
            )
            assert RECLAIM_S <= blocked["ts"] - killed_at < RECLAIM_S + 2
            assert "MEMORY NOT RECLAIMED" in lmx.cli("status", check=False).stdout
            refused = ask(lmx.url, "second", stream=False, headers={"X-LMX-On-Crash": "fail"})
            assert events_since(lmx, killed_at, "process_started", model="second") == [], "started blindly"
            # An innocent model is not held up by it.
            load(stage, "third")
            (site / "available").unlink()
            back_at = time.time()
            started = event_since(lmx, killed_at, "process_started", model="second")
            figure("row 25", "started once it is back", started["ts"] - back_at, target=1.0)
            assert -0.1 < started["ts"] - back_at < 2
            for call in (held, refused):
                call.wait()
                assert call.whole or (call.status, call.code) == (503, "model_restarting"), repr(call)
            lmx.wait_model("second", other_than=victim["incarnation"])
            assert lmx.model("second")["blocked"] is None
            assert len(events_since(lmx, killed_at, "memory_not_reclaimed")) == 1, "said once"
        # With enough from the start nothing is waited for.
        victim, killed_at = lmx.model("second"), time.time()
        for _ in deadline(5):
            if lmx.model("second")["memory_bytes"]:
                break
        os.kill(victim["pid"], signal.SIGKILL)
        started = event_since(lmx, killed_at, "process_started", model="second")
        assert events_since(lmx, killed_at, "memory_not_reclaimed") == []
    finally:
        stage.close()
