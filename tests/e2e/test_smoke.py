"""The smoke list: passes on a living system, and fails when something is wrong."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import Lmx

ROOT = Path(__file__).resolve().parents[2]


def smoke(*arguments: str) -> tuple[int, dict[str, str]]:
    """Return the exit code and the result of each check."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.smoke", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    rows = [(line[:18].strip(), line[18:26].strip()) for line in done.stdout.splitlines()[1:]]
    assert rows, done.stderr
    return done.returncode, dict(rows)


def test_the_smoke_list_passes_on_a_running_instance_and_fails_with_a_wrong_key(
    new_lmx: Callable[..., Lmx], tiny_model: Path
) -> None:
    lmx = new_lmx().start()
    lmx.load(tiny_model, "alpha")
    admin = (lmx.home / "admin.key").read_text().strip()
    pid = lmx.model("alpha")["pid"]
    code, found = smoke("--url", lmx.url, "--admin-key", admin)
    assert (code, set(found.values())) == (0, {"ok", "skipped"}), found
    passed = {"health", "admin auth", "inference auth", "answers", "request id", "audit row", "journal"}
    assert {name for name, result in found.items() if result == "ok"} == passed
    assert lmx.model("alpha")["pid"] == pid  # nothing was disturbed
    code, found = smoke("--url", lmx.url, "--admin-key", "wrong")
    assert (code, found["admin auth"], found["health"]) == (1, "FAILED", "ok")


@pytest.mark.slow
def test_the_whole_list_passes_on_an_instance_of_its_own() -> None:
    code, found = smoke()
    assert (code, set(found.values())) == (0, {"ok"}), found
