"""Rows 53, 54 and 61: what is wrong around LMX is said, and no request notices."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.scene import put
from tests.chaos.test_rows_gateway import stage_of, undisturbed
from tests.fault.plan import FaultPlan

CORPUS = Path(__file__).resolve().parents[1] / "corpus" / "launchd"


def tool(folder: Path, name: str, script: str) -> str:
    """Put a program into a folder, and return a PATH on which it is the first."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_row_53_exit_timeout_too_small(tiny_model: Path, tmp_path: Path) -> None:
    path = tool(tmp_path / "bin", "launchctl", f"cat '{CORPUS / 'system-default.txt'}'")
    with stage_of(tiny_model, PATH=path, LMX_LIFECYCLE__DRAIN_S="30") as stage, undisturbed(stage.lmx):
        event = stage.lmx.wait_event("job_misconfigured")
        assert "ExitTimeOut" in event["reason"]
        screen = stage.lmx.cli("status").stdout
        assert "LAUNCHD: launchd kills the supervisor 5 s after asking it to stop" in screen
        findings = json.loads(stage.lmx.cli("doctor", "--json").stdout)["checks"]
        jobs = [finding["message"] for finding in findings if finding["id"] == "job"]
        assert len(jobs) == 2
        assert "ExitTimeOut" in jobs[0]


def test_row_53_a_launchctl_that_hangs_holds_nothing_up(tiny_model: Path, tmp_path: Path) -> None:
    path = tool(tmp_path / "bin", "launchctl", "exec sleep 600")
    with stage_of(tiny_model, PATH=path) as stage, undisturbed(stage.lmx):
        assert stage.lmx.status() is not None


def test_row_54_throttled_gpu(tiny_model: Path) -> None:
    """The same model, first timed at 10 ms per token, then at 83 ms."""
    with stage_of(tiny_model) as stage, undisturbed(stage.lmx):
        lmx = stage.lmx
        stage.plans(FaultPlan(models=("victim",), step_s=0.010))
        lmx.load(stage.folder, "victim")
        lmx.wait_status(lambda document: model_of(document)["pace"] == 1.0)
        stage.plans(FaultPlan(models=("victim",), step_s=0.0833))
        before = lmx.model("victim")["incarnation"]
        lmx.cli("restart-worker", "victim")
        lmx.wait_model("victim", other_than=before)
        event = lmx.wait_event("gpu_throttled", model="victim")
        assert (event["share"], event["step_ms"], event["usual_ms"]) == (0.12, 83.3, 10.0)
        assert "victim generates at 0.12 of its usual speed" in lmx.cli("status").stdout
        # Not a failure: it serves, and is not restarted for it.
        assert lmx.model("victim")["state"] == "ready"


def model_of(document: dict[str, Any]) -> dict[str, Any]:
    return next(model for model in document["models"] if model["id"] == "victim")


HOT = '{"gpu_usage": [338, 0.97], "temp": {"gpu_temp_avg": 104.2}, "gpu_power": 9.1, "cpu_power": 3.0}'
COOL = '{"gpu_usage": [1398, 0.97], "temp": {"gpu_temp_avg": 61.0}, "gpu_power": 21.5, "cpu_power": 3.0}'


def test_row_61_thermal_critical(tiny_model: Path, tmp_path: Path) -> None:
    sample = tmp_path / "sample"
    sample.write_text(HOT)
    path = tool(tmp_path / "bin", "macmon", f'while :; do cat "{sample}"; echo; sleep 0.1; done')
    settings = {"LMX_THERMAL__INTERVAL_S": "0.1", "PATH": path}
    with stage_of(tiny_model, **settings) as stage, undisturbed(stage.lmx):
        lmx = stage.lmx
        assert lmx.wait_event("thermal_throttled")["gpu_temp_c"] == 104.2
        assert "THROTTLED: the GPU runs at 338 MHz though it has work" in lmx.cli("status").stdout
        put(sample, COOL.encode())  # in one piece: a program that says half a sample is started anew
        lmx.wait_event("thermal_nominal")
        document = lmx.wait_status(lambda document: document["thermal"]["status"] == "nominal")
        assert document["thermal"]["gpu_freq_mhz"] == 1398


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(None, id="row_61_absent"),
        pytest.param("echo 'not json'; exec sleep 600", id="row_61_bad_json"),
        pytest.param("exec sleep 600", id="row_61_hangs"),
        pytest.param("exit 3", id="row_61_fails"),
    ],
)
def test_row_61_macmon_that_cannot_be_used(tiny_model: Path, tmp_path: Path, script: str | None) -> None:
    settings = {"LMX_THERMAL__INTERVAL_S": "0.1", "LMX_THERMAL__TIMEOUT_S": "0.3"}
    if script is not None:
        settings["PATH"] = tool(tmp_path / "bin", "macmon", f"echo $$ >> '{tmp_path}/ran'; {script}")
    with stage_of(tiny_model, **settings) as stage, undisturbed(stage.lmx):
        lmx = stage.lmx
        if script is not None:
            lmx.wait_status(lambda _: (tmp_path / "ran").exists() and "\n" in (tmp_path / "ran").read_text())
            pids = {int(line) for line in (tmp_path / "ran").read_text().split()}
            # One that hangs is ended, and not started again at once.
            lmx.wait_status(lambda _: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids))
            assert {int(line) for line in (tmp_path / "ran").read_text().split()} == pids
        document = lmx.status()
        assert document is not None
        assert document["thermal"]["status"] == "unknown"
        assert document["supervisor"]["internal_errors"] == 0
        assert "THROTTLED" not in lmx.cli("status").stdout
    assert shutil.which("macmon") is None, "a real one would have been found"
