"""What operators type: `lmx-supervisor` against real processes (workers without MLX where MLX is not the point)."""

import contextlib
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from tests.harness import Lmx, chat, deadline

#: Makes the terminal at stdin the controlling one, as a login does, and becomes the supervisor.
OWN_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "supervisor", "run"])
"""
FAULT = {"LMX_WORKER__MODULE": "tests.fault"}


@pytest.fixture
def lmx(new_lmx: Callable[..., Lmx]) -> Lmx:
    return new_lmx(**FAULT)


def test_status_json_has_the_documented_shape_and_exit_codes(lmx: Lmx, tiny_model: Path) -> None:
    missing = lmx.cli("status", "--json", check=False)
    assert (missing.returncode, missing.stdout) == (4, "")
    assert "lmx-supervisor run" in missing.stderr or "no supervisor" in missing.stderr
    lmx.start()
    empty = json.loads(lmx.cli("status", "--json").stdout)
    assert (empty["schema"], empty["models"]) == ("lmx.status/1", [])
    lmx.load(tiny_model, "one")
    document = json.loads(lmx.cli("status", "--json").stdout)
    assert document["supervisor"]["pid"] == (lmx.process.pid if lmx.process else 0)
    assert document["supervisor"]["uptime_s"] > 0
    assert document["gateway"]["state"] == "ready"
    assert document["gateway"]["url"].startswith("http://127.0.0.1:")
    assert psutil.pid_exists(document["gateway"]["pid"])
    lmx.wait_status(lambda doc: bool(doc["models"][0]["memory_bytes"]))
    (model,) = json.loads(lmx.cli("status", "--json").stdout)["models"]
    assert {"id", "state", "pid", "incarnation", "restarts", "last_exit", "memory_bytes"} <= set(model)
    assert (model["id"], model["state"], model["restarts"], model["last_exit"]) == ("one", "ready", 0, None)
    assert 5_000_000 < model["memory_bytes"] < 500_000_000
    text = lmx.cli("status").stdout
    assert "one" in text
    assert "ready" in text
    assert str(model["pid"]) in text


def test_status_of_a_dead_supervisor_shows_the_last_snapshot_and_exits_4(lmx: Lmx, tiny_model: Path) -> None:
    lmx.start()
    lmx.load(tiny_model, "one")
    lmx.kill_supervisor()
    done = lmx.cli("status", "--json", check=False)
    assert done.returncode == 4
    snapshot = json.loads(done.stdout)
    assert snapshot["snapshot_age_s"] >= 0
    assert snapshot["models"][0]["id"] == "one"
    assert "does not run" in lmx.cli("status", check=False).stdout


def test_status_exits_3_while_a_model_is_not_ready(lmx: Lmx, tiny_model: Path) -> None:
    lmx.environ["LMX_FAULT"] = json.dumps({"load_s": 30.0})
    lmx.start()
    loading = subprocess.Popen(
        [sys.executable, "-m", "supervisor", "load", str(tiny_model), "--id", "slow"],
        env=lmx.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lmx.wait_model("slow", "loading")
    assert lmx.cli("status", check=False).returncode == 3
    assert lmx.cli("unload", "slow").returncode == 0
    _, err = loading.communicate(timeout=30)
    assert loading.returncode == 1
    assert "unloaded meanwhile" in err


def test_load_reports_progress_in_bytes(lmx: Lmx, tiny_model: Path) -> None:
    lmx.environ["LMX_FAULT"] = json.dumps({"load_s": 2.0, "weight_bytes": 4 * 1024 * 1024})
    lmx.start()
    done = lmx.cli("load", str(tiny_model), "--id", "slow")
    assert "ready" in done.stdout
    units = {"B": 0, "KiB": 1, "MiB": 2}
    found = re.findall(r" ([\d.]+) (B|KiB|MiB) of 4\.0 MiB", done.stderr)
    amounts = [float(number) * 1024 ** units[unit] for number, unit in found]
    assert any(0 < amount < 4 * 1024**2 for amount in amounts), done.stderr
    assert amounts == sorted(amounts), done.stderr


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: os.truncate(folder / "model.safetensors", 1000), "model.safetensors"),
        (shutil.rmtree, "does not exist"),
        (lambda folder: (folder / "config.json").write_text("{nonsense"), "JSON"),
    ],
)
def test_a_broken_folder_is_refused_with_the_reason_and_exit_1(
    lmx: Lmx, tiny_model: Path, tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    damage(folder)
    lmx.start()
    done = lmx.cli("load", str(folder), "--id", "broken", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    document = lmx.status()
    assert document is not None
    assert document["models"] == []


def test_a_folder_that_only_the_worker_can_refuse_is_refused_too_and_leaves_nothing(
    new_lmx: Callable[..., Lmx], tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_architecture"}))
    lmx = new_lmx().start()
    done = lmx.cli("load", str(folder), "--id", "odd", check=False)
    assert done.returncode == 1
    assert "no_such_architecture" in done.stderr
    document = lmx.status()
    assert document is not None
    assert document["models"] == []
    assert len([e for e in lmx.journal() if e["event"] == "process_started" and e["model"] == "odd"]) == 1


def test_a_model_that_names_nothing_is_refused(lmx: Lmx) -> None:
    lmx.start()
    done = lmx.cli("load", "no-such-model", check=False)
    assert done.returncode == 1
    assert "smollm2-135m-instruct" in done.stderr


def test_several_names_for_one_folder_and_names_with_slashes(lmx: Lmx, tiny_model: Path) -> None:
    lmx.start()
    lmx.cli("load", str(tiny_model))
    lmx.cli("load", str(tiny_model), "--id", "org/name-4bit")
    again = lmx.cli("load", str(tiny_model), "--id", "org/name-4bit")
    assert "ready" in again.stdout
    document = lmx.status()
    assert document is not None
    assert [m["id"] for m in document["models"]] == ["tiny", "org/name-4bit"]
    found = httpx.get(f"{lmx.url}/v1/models/org/name-4bit").json()
    assert (found["id"], found["state"]) == ("org/name-4bit", "ready")
    bad = lmx.cli("load", str(tiny_model), "--id", "../etc/passwd", check=False)
    assert bad.returncode == 2
    taken = lmx.cli("load", str(tiny_model.parent), "--id", "tiny", check=False)
    assert taken.returncode == 1


def test_unload_ends_the_process_and_is_remembered_over_a_restart(lmx: Lmx, tiny_model: Path) -> None:
    lmx.start()
    lmx.load(tiny_model, "keep")
    lmx.load(tiny_model, "drop")
    pid = lmx.model("drop")["pid"]
    lmx.cli("unload", "drop")
    assert not psutil.pid_exists(pid)
    assert lmx.cli("unload", "drop", check=False).returncode == 4
    assert lmx.stop() == 0
    lmx.start()
    document = lmx.wait_status(lambda doc: any(m["state"] == "ready" for m in doc["models"]))
    assert [m["id"] for m in document["models"]] == ["keep"]


def test_an_unloaded_configured_model_stays_unloaded_until_it_is_loaded(lmx: Lmx, tiny_model: Path) -> None:
    (lmx.home / "models").mkdir(parents=True)
    shutil.copytree(tiny_model, lmx.home / "models" / "auto")
    lmx.environ["LMX_MODELS__AUTO_LOAD"] = '["auto", "absent"]'
    lmx.start()
    lmx.wait_model("auto")
    lmx.cli("unload", "auto")
    lmx.stop()
    lmx.start()
    document = lmx.status()
    assert document is not None
    assert document["models"] == []
    lmx.cli("load", "auto")
    lmx.stop()
    lmx.start()
    lmx.wait_model("auto")


def test_restart_worker_waits_for_the_new_process_and_names_both(lmx: Lmx, tiny_model: Path) -> None:
    lmx.start()
    lmx.load(tiny_model, "a")
    lmx.load(tiny_model, "b")
    old, other = lmx.model("a")["pid"], lmx.model("b")["pid"]
    done = lmx.cli("restart-worker", "a")
    new = lmx.model("a")
    assert done.stdout.strip() == f"a: pid {old} -> {new['pid']}"
    assert (new["state"], new["restarts"]) == ("ready", 1)
    assert lmx.model("b")["pid"] == other
    assert lmx.cli("restart-worker", "none", check=False).returncode == 4


def test_stop_ends_everything(lmx: Lmx, tiny_model: Path) -> None:
    lmx.start()
    lmx.load(tiny_model, "a")
    assert lmx.cli("stop").stdout.strip() == "stopped"
    assert lmx.process is not None
    assert lmx.process.wait(60) == 0
    assert lmx.processes() == []
    assert lmx.cli("stop", check=False).returncode == 4


def test_a_worker_that_ignores_every_request_to_end_is_killed_within_the_grace(lmx: Lmx, tiny_model: Path) -> None:
    lmx.environ["LMX_FAULT"] = json.dumps({"ignore_sigterm": True})
    lmx.start()
    lmx.load(tiny_model, "stubborn")
    psutil.Process(lmx.model("stubborn")["pid"]).suspend()
    begun = time.monotonic()
    assert lmx.stop() == 0
    assert time.monotonic() - begun < 35  # of the configured 5 to drain and 3 to stop; unconfigured they are 30 and 15
    assert lmx.processes() == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[gateway]\nprot = 1\n", ["lmx.toml:2", "gateway.prot", "gateway.port"]),
        ("[gateway]\n\nport = 'x'\n", ["lmx.toml:3", "gateway.port", "int"]),
        ("[gatway]\n", ["lmx.toml:1", "gatway", "gateway"]),
        ("not toml", ["lmx.toml", "TOML"]),
    ],
)
def test_a_bad_configuration_names_the_place_and_exits_5(lmx: Lmx, text: str, words: list[str]) -> None:
    (lmx.home / "lmx.toml").write_text(text)
    done = lmx.cli("run", check=False)
    assert done.returncode == 5
    for word in words:
        assert word in done.stderr, done.stderr
    elsewhere = lmx.home / "other.toml"
    elsewhere.write_text(text)
    (lmx.home / "lmx.toml").unlink()
    done = lmx.cli("run", "--config", str(elsewhere), check=False)
    assert (done.returncode, "other.toml" in done.stderr) == (5, True)


def test_a_bad_variable_and_a_missing_file_exit_5(lmx: Lmx) -> None:
    lmx.environ["LMX_GATEWAY__PROT"] = "1"
    done = lmx.cli("run", check=False)
    assert done.returncode == 5
    assert "LMX_GATEWAY__PROT" in done.stderr
    assert "gateway.port" in done.stderr
    del lmx.environ["LMX_GATEWAY__PROT"]
    assert lmx.cli("run", "--config", "/nonexistent/lmx.toml", check=False).returncode == 5


def free_port() -> int:
    """Return a port that is free, and that the system gives to nobody who asks for any port."""
    while True:
        port = random.randint(20_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def test_the_file_and_the_environment_configure_the_port(lmx: Lmx) -> None:
    port = free_port()
    del lmx.environ["LMX_GATEWAY__PORT"]
    (lmx.home / "lmx.toml").write_text(f"[gateway]\nport = {port}\n")
    lmx.start()
    assert lmx.url == f"http://127.0.0.1:{port}"
    lmx.stop()
    lmx.environ["LMX_GATEWAY__PORT"] = "0"
    lmx.start()
    assert lmx.url != f"http://127.0.0.1:{port}"


def test_a_taken_port_is_named_and_taken_over_when_it_is_free(lmx: Lmx) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        lmx.environ["LMX_GATEWAY__PORT"] = str(port)
        lmx.start(wait=False)
        for _ in deadline(60):
            if "cannot listen" in lmx.tail():
                break
        assert f"127.0.0.1:{port}" in lmx.tail()
        assert str(os.getpid()) in lmx.tail()
    lmx.wait_status(lambda doc: doc["gateway"]["state"] == "ready")
    assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200


def test_a_crash_loop_is_set_aside_with_a_reason_while_the_rest_serves(lmx: Lmx, tiny_model: Path) -> None:
    lmx.environ["LMX_FAULT"] = json.dumps({"models": ["bad"], "at": "loading", "deed": "abort"})
    lmx.start()
    lmx.load(tiny_model, "good")
    done = lmx.cli("load", str(tiny_model), "--id", "bad", check=False)
    assert done.returncode == 1
    assert "SIGABRT" in done.stderr
    bad = lmx.model("bad")
    assert (bad["state"], bad["last_exit"]["signal"]) == ("quarantined", "SIGABRT")
    started = [e for e in lmx.journal() if e["event"] == "process_started" and e["model"] == "bad"]
    assert len(started) == 3
    answer = httpx.post(f"{lmx.url}/v1/chat/completions", json=chat("bad", max_tokens=2, stream=False))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_quarantined")
    answer = httpx.post(f"{lmx.url}/v1/chat/completions", json=chat("good", max_tokens=2, stream=False))
    assert answer.status_code == 200
    assert "set aside" in lmx.cli("status", check=False).stdout


def test_a_model_that_is_still_loading_answers_503_model_loading(lmx: Lmx, tiny_model: Path) -> None:
    lmx.environ["LMX_FAULT"] = json.dumps({"load_s": 20.0})
    (lmx.home / "models").mkdir(parents=True)
    shutil.copytree(tiny_model, lmx.home / "models" / "auto")
    lmx.environ["LMX_MODELS__AUTO_LOAD"] = '["auto"]'
    lmx.environ["LMX_GATEWAY__HOLD_WHILE_LOADING_S"] = "0"
    lmx.start()
    lmx.wait_model("auto", "loading")
    answer = httpx.post(f"{lmx.url}/v1/chat/completions", json=chat("auto", max_tokens=2, stream=False))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
    assert int(answer.headers["retry-after"]) >= 1
    assert httpx.get(f"{lmx.url}/readyz").status_code == 503


def test_the_first_screen_shows_a_url_and_a_curl_line_that_works(new_lmx: Callable[..., Lmx], tiny_model: Path) -> None:
    """On a real terminal, and Ctrl-C typed there ends it with 0."""
    lmx = new_lmx()
    folder = lmx.home / "models" / "auto"
    shutil.copytree(tiny_model, folder)
    # The line asks for no number of tokens: an answer of these weights ends with the context.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    environ = {**lmx.environ, "LMX_MODELS__AUTO_LOAD": '["auto"]'}
    master, slave = pty.openpty()
    lmx.process = subprocess.Popen(
        [sys.executable, "-c", OWN_TERMINAL],
        env=environ, stdin=slave, stdout=slave, stderr=slave,
    )  # fmt: skip
    os.close(slave)
    screen = b""
    for _ in deadline(60):
        if select.select([master], [], [], 0.1)[0]:
            screen += os.read(master, 65536)
        if b"Ctrl-C" in screen:
            break
    text = screen.decode().replace("\r\n", "\n")
    command = next(line.strip() for line in text.splitlines() if line.strip().startswith("curl "))
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"
    os.write(master, b"\x03")
    for _ in deadline(30):
        if select.select([master], [], [], 0.05)[0]:
            try:
                os.read(master, 65536)
            except OSError:
                break
        if lmx.process.poll() is not None:
            break
    assert lmx.process.wait(60) == 0
    os.close(master)
    assert lmx.processes() == []


def test_an_unsafe_home_is_refused_with_words(lmx: Lmx, tmp_path: Path) -> None:
    (lmx.home / "state").symlink_to(tmp_path)
    done = lmx.cli("run", check=False)
    assert done.returncode == 5
    assert "link" in done.stderr
    long = Path("/tmp") / ("x" * 90)
    lmx.environ["LMX_HOME"] = str(long)
    done = lmx.cli("run", check=False)
    lmx.environ["LMX_HOME"] = str(lmx.home)
    assert done.returncode == 5
    assert "too long" in done.stderr
    assert not long.exists()


def test_sockets_and_state_are_private(lmx: Lmx, tiny_model: Path) -> None:
    lmx.start()
    lmx.load(tiny_model, "a")
    for folder in ("run", "state", "logs"):
        assert (lmx.home / folder).stat().st_mode & 0o077 == 0
        for entry in (lmx.home / folder).iterdir():
            with contextlib.suppress(FileNotFoundError):  # one that has just got its proper name
                assert entry.lstat().st_mode & 0o077 == 0 or entry.is_symlink(), entry


def test_sigterm_while_a_model_loads_still_ends_cleanly(lmx: Lmx, tiny_model: Path) -> None:
    lmx.environ["LMX_FAULT"] = json.dumps({"load_s": 30.0})
    (lmx.home / "models").mkdir(parents=True)
    shutil.copytree(tiny_model, lmx.home / "models" / "auto")
    lmx.environ["LMX_MODELS__AUTO_LOAD"] = '["auto"]'
    lmx.start()
    lmx.wait_model("auto", "loading")
    assert lmx.stop(signal.SIGTERM) == 0
    assert lmx.processes() == []
