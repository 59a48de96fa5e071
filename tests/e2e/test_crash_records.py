"""Every crash leaves a record that an operator can read, also when no supervisor runs, and never a prompt."""

import contextlib
import json
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from tests.harness import Lmx, chat, deadline

FAULT = {"LMX_WORKER__MODULE": "tests.fault"}


@pytest.fixture
def lmx(new_lmx: Callable[..., Lmx]) -> Lmx:
    return new_lmx(**FAULT)


def crashes(lmx: Lmx, *arguments: str) -> dict[str, object]:
    document: dict[str, object] = json.loads(lmx.cli("crashes", *arguments, "--json").stdout)
    return document


def test_a_crash_is_recorded_with_class_words_and_what_was_known(lmx: Lmx, tiny_model: Path) -> None:
    lmx.start()
    lmx.load(tiny_model, "one")
    lmx.wait_status(lambda doc: bool(doc["models"][0]["memory_bytes"]))
    victim = lmx.model("one")
    psutil.Process(victim["pid"]).send_signal(signal.SIGABRT)
    lmx.wait_model("one", other_than=victim["incarnation"])
    (entry,) = crashes(lmx)["crashes"]  # type: ignore[misc]
    assert (entry["class"], entry["signal"], entry["model"]) == ("native_crash", "SIGABRT", "one")
    record = crashes(lmx, entry["id"])
    assert lmx.wait_event("process_exited", pid=victim["pid"])["crash"] == entry["id"]
    text = json.dumps(record)
    for known in (f'"pid": {victim["pid"]}', '"phase"', '"memory"', '"versions"', '"uptime_s"'):
        assert known in text
    folder = lmx.home / "crashes" / entry["id"]
    assert folder.stat().st_mode & 0o077 == 0
    assert lmx.stop() == 0
    assert entry["id"] in lmx.cli("crashes").stdout, "readable without a supervisor"
    assert lmx.cli("crashes", "no-such-crash", check=False).returncode != 0


def test_a_planned_restart_leaves_no_record(lmx: Lmx, tiny_model: Path) -> None:
    lmx.start()
    lmx.load(tiny_model, "one")
    lmx.cli("restart-worker", "one")
    lmx.cli("unload", "one")
    assert crashes(lmx)["crashes"] == []


def test_a_metal_error_is_told_by_its_class_everywhere(lmx: Lmx, tiny_model: Path) -> None:
    lmx.environ["LMX_GATEWAY__ON_CRASH"] = "fail"
    lmx.environ["LMX_LIFECYCLE__RESTART_DELAYS_S"] = "[30.0]"
    lmx.start()
    lmx.load(tiny_model, "one")
    secret = "Walrus-9921 [[raise]]"
    httpx.post(f"{lmx.url}/v1/chat/completions", json=chat("one", max_tokens=9, stream=False, text=secret), timeout=30)
    model = lmx.wait_status(lambda doc: doc["models"][0]["state"] == "backoff")["models"][0]
    assert model["last_exit"]["class"].startswith(("gpu", "metal"))
    exited = lmx.wait_event("process_exited")
    assert exited["exit_class"] == model["last_exit"]["class"]
    folder = lmx.home / "crashes" / exited["crash"]
    assert {"record.json", "stderr.txt"} <= {file.name for file in folder.iterdir()}
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # the record is replaced when the gateway has named its requests
            assert "Walrus" not in file.read_text()
    assert "Walrus" not in (lmx.home / "state" / "events.jsonl").read_text()


def test_a_hang_is_recorded_with_the_stacks(lmx: Lmx, tiny_model: Path) -> None:
    lmx.environ |= {"LMX_LIFECYCLE__DECODE_S": "1", "LMX_LIFECYCLE__PREFILL_S": "1", "LMX_GATEWAY__ON_CRASH": "fail"}
    lmx.start()
    lmx.load(tiny_model, "one")
    body = chat("one", max_tokens=9, stream=False, text="[[freeze]]")
    httpx.post(f"{lmx.url}/v1/chat/completions", json=body, timeout=60)
    lmx.wait_event("hung")
    exited = lmx.wait_event("process_exited")
    assert exited["exit_class"] == "hang"
    folder = lmx.home / "crashes" / exited["crash"]
    for _ in deadline(30):  # the record follows the journal's line
        if folder.is_dir():
            break
    assert any("step" in file.read_text() for file in folder.iterdir() if "stack" in file.name), list(folder.iterdir())
