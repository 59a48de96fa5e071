"""Rows 37 to 44 of the failure matrix: the gateway dies, freezes, runs out of descriptors, cannot start.

The first part is what the rows of all roles use besides `tests.chaos.scene`.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from protocol import control
from protocol.paths import Home
from protocol.spec import GatewaySpec, read_spec, write_spec
from supervisor.client import Client
from tests.chaos.clients import OTHER, PATIENCE_S, Call, Others
from tests.chaos.figures import Figure
from tests.chaos.scene import FAIL, Stage
from tests.harness import Lmx, chat, deadline

ROOT = Path(__file__).parents[2]
#: So many failures of a model are no crash loop here, and heartbeats are frequent.
PATIENT = {
    "LMX_LIFECYCLE__HEARTBEAT_S": "0.2",
    "LMX_LIFECYCLE__BURST_FAILURES": "1000",
    "LMX_LIFECYCLE__UNREADY_FAILURES": "1000",
    "LMX_LIFECYCLE__SLOW_FAILURES": "1000",
    "LMX_LIFECYCLE__SAFE_MODE_STARTS": "1000",
    "LMX_LIFECYCLE__RESTART_DELAYS_S": "[0.0, 0.1, 0.2]",
    "LMX_LIFECYCLE__DEGRADED_FROM_TRY": "1000",
}
#: Python runs this at the start of every process: the patch for the module that the process is, if there is one.
_SITE = """
import os, sys
_here = os.path.dirname(os.path.abspath(__file__))
_module = next((sys.orig_argv[i + 1] for i, word in enumerate(sys.orig_argv) if word == "-m"), "")
for _name in ("all", _module):
    if os.path.exists(f"{_here}/{_name}.patch"):
        with open(f"{_here}/{_name}.patch") as _file:
            exec(compile(_file.read(), f"{_name}.patch", "exec"), {"HERE": _here})
"""

#: A request finds a file, and blocks the event loop.
BLOCKING_PATCH = """
import os, time
from gateway.calls import Calls
def block_for_ever():
    while True:
        time.sleep(1)
real = Calls.admit
def admit(self):
    if os.path.exists(f"{HERE}/block"):
        os.unlink(f"{HERE}/block")
        block_for_ever()
    return real(self)
Calls.admit = admit
"""


#: While a file is there, the supervisor has no descriptor to watch a process with. Whom it meant to is written down.
BLIND_PATCH = """
import errno, os
from supervisor.platform.linux import Linux
real = Linux.watch_exit
def watch_exit(self, loop, pid, gone):
    if os.path.exists(f"{HERE}/blind"):
        with open(f"{HERE}/unwatched", "a") as file:
            file.write(f"{pid}\\n")
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return real(self, loop, pid, gone)
Linux.watch_exit = watch_exit
"""


# -- for all rows -------------------------------------------------------------------------------------------------


def patched(folder: Path, **patches: str) -> dict[str, str]:
    """Return the environment in which processes begin with a patch, by module; "all" is for every process."""
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(_SITE)
    for module, text in patches.items():
        (folder / f"{module}.patch").write_text(text)
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}


@contextlib.contextmanager
def stage_of(folder: Path, **settings: str) -> Iterator[Stage]:
    """Play on a stage of one's own."""
    stage = Stage(folder, **{**PATIENT, **settings})
    try:
        yield stage
    finally:
        try:
            stage.close()
        finally:
            for process in stage.lmx.processes():  # of one that did not end: it must not outlive its test
                process.kill()
            if stage.lmx.process is not None:
                stage.lmx.process.wait(10)


@contextlib.contextmanager
def undisturbed(lmx: Lmx) -> Iterator[None]:
    """Assert that requests to the other model and to /healthz show no error while the block runs."""
    with Others(lmx) as others:
        yield
        for _ in deadline(PATIENCE_S):  # a short block is none without a request in it
            if others.streams and others.polls:
                break


def load(stage: Stage, *models: str) -> None:
    """Load models from the stage's folder, each until it is ready."""
    for model in models:
        client = Client(Home(stage.lmx.home))
        try:
            request = control.LoadRequest(model, str(stage.folder))
            result = next(m for m in client.ask(request, within_s=60) if isinstance(m, control.Result))
        finally:
            client.close()
        assert result.exit_code == 0, (result, stage.lmx.tail())


def unload(stage: Stage, model: str) -> None:
    client = Client(Home(stage.lmx.home))
    try:
        assert any(isinstance(m, control.Result) for m in client.ask(control.UnloadRequest(model), within_s=30))
    finally:
        client.close()


def ask(url: str, model: str = OTHER, text: str = "Hello there", **more: Any) -> Call:
    """Send a request; streaming unless asked otherwise."""
    headers = more.pop("headers", {})
    return Call(url, chat(model, text=text, **{"max_tokens": 20, "stream": True, **more}), headers)


def pids(lmx: Lmx) -> dict[str, int]:
    """Return the process of each model."""
    document = lmx.status()
    assert document is not None
    return {entry["id"]: int(entry["pid"] or 0) for entry in document["models"]}


def gateway_of(lmx: Lmx) -> dict[str, Any]:
    document = lmx.status()
    assert document is not None
    found: dict[str, Any] = document["gateway"]
    return found


def took(url: str, model: str, count: int, max_tokens: int) -> tuple[float, float]:
    """Ask so often, one after the other; return the median and the p99 of the times, in seconds."""
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as http:
        times = []
        for _ in range(count):
            asked = time.monotonic()
            answer = http.post("/v1/chat/completions", json=chat(model, max_tokens=max_tokens, stream=False))
            times.append(time.monotonic() - asked)
            assert answer.status_code == 200
    return sorted(times)[count // 2], sorted(times)[int(count * 0.99)]


def idle(lmx: Lmx, *models: str, within_s: float = PATIENCE_S) -> None:
    """Wait until the workers of these models, or of all, have no request: what their heartbeats say."""

    def are_idle(document: dict[str, Any]) -> bool:
        asked = [m for m in document["models"] if not models or m["id"] in models]
        return all(m["running"] == m["waiting"] == 0 for m in asked)

    lmx.wait_status(are_idle, within_s)


def workers_of(lmx: Lmx, model: str) -> list[int]:
    """Return the living worker processes of a model, known or not."""
    found = []
    for process in lmx.processes():
        with contextlib.suppress(psutil.Error):  # it may end while we look
            if f"/{model}-" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def events_since(lmx: Lmx, since: float, name: str = "", **fields: object) -> list[dict[str, Any]]:
    return [
        entry
        for entry in lmx.journal()
        if entry["ts"] >= since
        and name in {"", entry["event"]}
        and all(entry.get(key) == value for key, value in fields.items())
    ]


def event_since(lmx: Lmx, since: float, name: str, within_s: float = PATIENCE_S, **fields: object) -> dict[str, Any]:
    for _ in deadline(within_s):
        found = events_since(lmx, since, name, **fields)
        if found:
            return found[0]
    raise AssertionError((name, fields, lmx.journal()[-10:], lmx.tail()))


def answers(url: str, within_s: float = 20.0) -> float:
    """Ask /healthz on a connection of its own; return how long the answer took. Being refused is a failure."""
    address, asked = httpx.URL(url), time.monotonic()
    with socket.create_connection((str(address.host), int(address.port or 0)), timeout=within_s) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert raw.recv(64).startswith(b"HTTP/1.1 200")
    return time.monotonic() - asked


# -- the rows -----------------------------------------------------------------------------------------------------

GATEWAY_PATCH = """
import gateway.models
real = gateway.models.Models.__call__
async def call(self, scope, receive, send):
    if (b"x-boom", b"1") in scope["headers"]:
        secret = "Canary-Marker-90210"
        raise ValueError(secret)
    await real(self, scope, receive, send)
gateway.models.Models.__call__ = call
"""


@pytest.fixture(scope="module")
def stage(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    site = tmp_path_factory.mktemp("site") / "site"
    with stage_of(tiny_model, **patched(site, gateway=GATEWAY_PATCH)) as made:
        load(made, "second")
        yield made


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_row_37_gateway_killed_under_load(stage: Stage, figure: Figure, number: signal.Signals) -> None:
    lmx, url = stage.lmx, stage.lmx.url
    before, gateway = pids(lmx), gateway_of(lmx)
    streams = [ask(url, model, "[[tokens 4000]]", max_tokens=4000) for model in (OTHER, "second") for _ in range(8)]
    for stream in streams:
        stream.wait_chunks(5)
    killed_at = time.time()
    os.kill(gateway["pid"], number)
    waiting = [ask(url, model, max_tokens=3, stream=stream) for model in before for stream in (True, False)]
    figure("row 37", f"port answers again after {number.name}", answers(url), target=1.0)
    assert time.time() - killed_at < 20
    for stream in streams:
        stream.wait()
        assert stream.broken, "a connection that broke does not look like an end"
        assert stream.ends == 0
    for call in waiting:
        assert call.wait().whole, repr(call)
    exited = event_since(lmx, killed_at, "process_exited", pid=gateway["pid"])
    figure("row 37", f"death seen after {number.name}", exited["ts"] - killed_at, target=0.05)
    assert exited["signal"] == number.name
    idle(lmx)  # the workers have dropped what the dead gateway had asked for
    assert pids(lmx) == before
    assert gateway_of(lmx)["restarts"] == gateway["restarts"] + 1


def test_row_38_gateway_stopped(stage: Stage, figure: Figure) -> None:
    lmx, url = stage.lmx, stage.lmx.url
    before, gateway = pids(lmx), gateway_of(lmx)
    # Going on before its deadline it is not replaced, and whoever waited is answered.
    stopped_at = time.time()
    os.kill(gateway["pid"], signal.SIGSTOP)
    waiting = ask(url)
    event_since(lmx, stopped_at, "heartbeat_late", slot="gateway")
    os.kill(gateway["pid"], signal.SIGCONT)
    assert waiting.wait().whole
    assert gateway_of(lmx)["pid"] == gateway["pid"]
    # Stopped for good it is found, ended and replaced.
    stream = ask(url, "second", "[[tokens 4000]]", max_tokens=4000).wait_chunks(5)
    stopped_at = time.time()
    os.kill(gateway["pid"], signal.SIGSTOP)
    waiting = ask(url)
    found = event_since(lmx, stopped_at, "hung", slot="gateway")
    figure("row 38", "found stopped", found["ts"] - stopped_at, target=8.0)
    answers(url)
    back_after = time.time() - stopped_at
    figure("row 38", "port answers again", back_after, target=8.5)
    assert found["ts"] - stopped_at < 14.5, "before the deadline of a worker"
    assert back_after < 25
    for call in (stream, waiting):
        call.wait()
        assert call.broken or call.whole, repr(call)
    assert not stream.whole
    after = gateway_of(lmx)
    assert after["pid"] != gateway["pid"]
    assert after["last_exit"]["class"] == "hang"
    assert pids(lmx) == before
    idle(lmx)
    assert ask(url, "second").wait().whole


def test_row_38_gateway_loop_blocked(tiny_model: Path, tmp_path: Path) -> None:
    """A handler that never returns: the supervisor gets the stacks before it ends the process."""
    settings = patched(tmp_path / "site", gateway=BLOCKING_PATCH)
    with stage_of(tiny_model, **settings) as stage:
        lmx, url = stage.lmx, stage.lmx.url
        before, gateway = pids(lmx), gateway_of(lmx)
        (tmp_path / "site" / "block").touch()
        blocked = ask(url)
        lmx.wait_event("hung", slot="gateway")
        answers(url)
        blocked.wait()
        assert blocked.broken
        assert gateway_of(lmx)["pid"] != gateway["pid"]
        assert pids(lmx) == before
        exited = lmx.wait_event("process_exited", slot="gateway", pid=gateway["pid"])
        assert exited["exit_class"] == "hang"
        folder = lmx.home / "crashes" / exited["crash"]
        for _ in deadline(PATIENCE_S):  # the record follows the journal's line
            if (folder / "record.json").exists():
                break
        stacks = (folder / "stacks.txt").read_text()
        assert "most recent call first" in stacks
        assert "gateway/" in stacks


def test_row_39_descriptors_exhausted_in_the_gateway(stage: Stage, figure: Figure) -> None:
    lmx, url = stage.lmx, stage.lmx.url
    address = (str(httpx.URL(url).host), int(httpx.URL(url).port or 0))
    gateway = gateway_of(lmx)
    process = psutil.Process(gateway["pid"])
    spared = process.rlimit(psutil.RLIMIT_NOFILE)
    with (
        httpx.Client(base_url=url, timeout=20) as early,
        httpx.Client(base_url=url, timeout=20) as second,
        ThreadPoolExecutor(1) as thread,
        contextlib.ExitStack() as crowd,
    ):
        assert [client.get("/healthz").status_code for client in (early, second)] == [200, 200]
        idle(lmx)
        process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds() + 12, spared[1]))
        for _ in range(200):
            crowd.enter_context(socket.create_connection(address, timeout=20))
        for _ in deadline(PATIENCE_S):
            if process.num_fds() >= process.rlimit(psutil.RLIMIT_NOFILE)[0] - 1:
                break
        assert process.num_fds() >= process.rlimit(psutil.RLIMIT_NOFILE)[0] - 1
        # Who was connected is served; new links are needed and cannot be had: no abort of libzmq.
        assert early.get("/healthz").status_code == 200
        body = chat(OTHER, max_tokens=3, stream=False)
        assert early.post("/v1/chat/completions", json=body).status_code == 200
        killed = lmx.model("second")
        os.kill(killed["pid"], signal.SIGABRT)
        lmx.wait_model("second", other_than=killed["incarnation"])
        load(stage, "third")
        wanted = chat("third", max_tokens=3, stream=False)
        held = thread.submit(lambda: second.post("/v1/chat/completions", json=wanted))
        before, since = process.cpu_times(), time.monotonic()
        while time.monotonic() - since < 1.0:
            assert early.get("/healthz").status_code == 200
            time.sleep(0.05)
        after = process.cpu_times()
        share = (after.user + after.system - before.user - before.system) / (time.monotonic() - since)
        figure("row 39", "processor share of a gateway without descriptors", share * 100, unit="%")
        assert share < 0.5
        crowd.close()
        answer = held.result(20)
        assert answer.status_code == 200 or answer.json()["error"]["code"] == "server_busy"
    assert b"link_failed" in (lmx.home / "logs" / "gateway.log").read_bytes(), "there was no need of a descriptor"
    answers(url)
    for model in (OTHER, "second", "third"):
        assert ask(url, model).wait().whole
    assert gateway_of(lmx)["pid"] == gateway["pid"]
    process.rlimit(psutil.RLIMIT_NOFILE, spared)
    unload(stage, "third")


def test_row_39_descriptors_exhausted_in_a_worker(stage: Stage) -> None:
    """libzmq aborts a process that binds and cannot accept: that process ends alone, and comes back."""
    lmx, url = stage.lmx, stage.lmx.url
    victim, gateway = lmx.model("second"), gateway_of(lmx)
    (endpoint,) = (lmx.home / "run").glob(f"second-*.{victim['incarnation']}.sock")
    process = psutil.Process(victim["pid"])
    with undisturbed(lmx), contextlib.ExitStack() as crowd:
        process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds() + 2, process.num_fds() + 2))
        for _ in range(20):
            stranger = crowd.enter_context(socket.socket(socket.AF_UNIX))
            stranger.setblocking(False)
            with contextlib.suppress(OSError):
                stranger.connect(str(endpoint))
        call = ask(url, "second", headers=FAIL).wait()
        assert call.ends == 1, repr(call)
    lmx.wait_model("second")
    for _ in deadline(PATIENCE_S):
        if ask(url, "second").wait().whole:
            break
    else:
        raise AssertionError("the model does not serve again")
    assert gateway_of(lmx)["pid"] == gateway["pid"]


def test_row_39_descriptors_exhausted_in_the_supervisor(tiny_model: Path) -> None:
    """With ever fewer descriptors left a worker dies: what a start needs is missing at another place each time."""
    with stage_of(tiny_model) as stage:
        lmx = stage.lmx
        load(stage, "second")
        assert lmx.process is not None
        supervisor, gateway = psutil.Process(lmx.process.pid), gateway_of(lmx)
        limits = supervisor.rlimit(psutil.RLIMIT_NOFILE)
        with undisturbed(lmx):
            for spare in (1, 0, -1, -3, -5):
                victim, since = lmx.model("second"), time.time()
                supervisor.rlimit(psutil.RLIMIT_NOFILE, (supervisor.num_fds() + spare, limits[1]))
                try:
                    os.kill(victim["pid"], signal.SIGKILL)
                    with contextlib.suppress(AssertionError):  # started, or not: with so few neither is certain
                        event_since(lmx, since, "process_started", 0.5, model="second")
                finally:
                    supervisor.rlimit(psutil.RLIMIT_NOFILE, limits)
                lmx.wait_model("second", other_than=victim["incarnation"])
                for _ in deadline(PATIENCE_S):
                    if workers_of(lmx, "second") == [lmx.model("second")["pid"]]:
                        break
                assert workers_of(lmx, "second") == [lmx.model("second")["pid"]], spare
                assert ask(lmx.url, "second").wait().whole
        assert supervisor.is_running()
        assert gateway_of(lmx)["pid"] == gateway["pid"]


def test_row_39_what_cannot_be_watched_does_not_run(tiny_model: Path, tmp_path: Path) -> None:
    """A start may take the last descriptor: nobody would notice the end of that process, and a second would come."""
    site = tmp_path / "site"
    with stage_of(tiny_model, **patched(site, supervisor=BLIND_PATCH)) as stage:
        lmx = stage.lmx
        load(stage, "second")
        victim, gateway, since = lmx.model("second"), gateway_of(lmx), time.time()

        def unwatched() -> list[int]:
            file = site / "unwatched"
            return [int(line) for line in file.read_text().splitlines()] if file.exists() else []

        with undisturbed(lmx):
            (site / "blind").touch()
            os.kill(victim["pid"], signal.SIGKILL)
            for _ in deadline(40):  # a try each 3 s
                started = unwatched()
                if len(started) > 2:
                    break
            assert len(set(started)) > 2, "each try is another process"
            assert [pid for pid in started[:-1] if psutil.pid_exists(pid)] == [], "it was left to itself"
            assert lmx.model("second")["last_exit"]["class"] == "no_resources"
            (site / "blind").unlink()
            lmx.wait_model("second", other_than=victim["incarnation"])
            assert workers_of(lmx, "second") == [lmx.model("second")["pid"]]
            assert ask(lmx.url, "second").wait().whole
        assert [pid for pid in unwatched() if psutil.pid_exists(pid)] == []
        for name in ("process_adopted", "stranger_dismissed"):
            assert events_since(lmx, since, name) == []
        assert gateway_of(lmx)["pid"] == gateway["pid"]


def test_row_40_port_in_use_at_start(tiny_model: Path, figure: Figure) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        lmx = Lmx(LMX_WORKER__MODULE="tests.fault", LMX_GATEWAY__PORT=str(port))
        try:
            lmx.start(wait=False)
            for _ in deadline(PATIENCE_S):
                if "cannot listen" in lmx.tail():
                    break
            assert f"127.0.0.1:{port}" in lmx.tail()
            assert f"pid {os.getpid()}" in lmx.tail(), "it names who holds the port"
            assert lmx.process is not None
            process = psutil.Process(lmx.process.pid)
            before = process.cpu_times()
            time.sleep(1.0)  # the measurement itself
            after = process.cpu_times()
            share = after.user + after.system - before.user - before.system
            figure("row 40", "processor share while it waits for the port", share * 100, target=5, unit="%")
            assert share < 0.15, "it asks again without pause"
            assert lmx.tail().count("cannot listen") == 1, "said once"
            taken.close()
            free_at = time.monotonic()
            lmx.wait_status(lambda doc: doc["gateway"]["state"] == "ready", within_s=20)
            figure("row 40", "serves after the port is free", time.monotonic() - free_at, target=2.0)
            answers(f"http://127.0.0.1:{port}")
        finally:
            lmx.close()


def test_row_41_two_supervisors_and_two_gateways(stage: Stage) -> None:
    lmx, url = stage.lmx, stage.lmx.url
    before, gateway = pids(lmx), gateway_of(lmx)
    assert lmx.process is not None
    since = time.time()
    with undisturbed(lmx):
        done = lmx.cli("run", check=False)
        assert done.returncode == 1
        assert f"pid {lmx.process.pid}" in done.stderr
        # A second gateway, started by hand from the same spec file on a socket of its own.
        (file,) = (lmx.home / "run").glob("gateway.*.json")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            spec = read_spec(file, GatewaySpec)
            mine = lmx.home / "run" / "by-hand.json"
            changes = {name: getattr(spec, name) for name in spec.__struct_fields__}
            write_spec(mine, GatewaySpec(**{**changes, "listen_fd": listener.fileno(), "log_file": ""}))
            second = subprocess.Popen(
                [sys.executable, "-m", "gateway", str(mine)],
                cwd=ROOT, env=lmx.environ, pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            event_since(lmx, since, "stranger_dismissed", what="gateway", pid=second.pid)
            second.wait(PATIENCE_S)
        mine.unlink()
    assert (pids(lmx), gateway_of(lmx)["pid"], lmx.url) == (before, gateway["pid"], url)
    assert ask(url).wait().whole


def test_row_43_unhandled_exception_in_a_handler(stage: Stage) -> None:
    lmx = stage.lmx
    with undisturbed(lmx):
        for number in range(5):
            headers = {"x-boom": "1", "x-request-id": f"boom-{number}"}
            answer = httpx.get(f"{lmx.url}/v1/models", headers=headers, timeout=PATIENCE_S)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["request_id"]) == (500, "internal_error", f"boom-{number}")
            assert answer.headers["x-request-id"] == f"boom-{number}"
            assert "Marker" not in answer.text
            assert "ValueError" not in answer.text
        assert httpx.get(f"{lmx.url}/v1/models", timeout=PATIENCE_S).status_code == 200
    log = (lmx.home / "logs" / "gateway.log").read_text()
    assert "boom-4" in log
    assert "ValueError" in log
    files, hits = 0, []
    for file in lmx.home.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # files are replaced while we look
            if file.is_file():
                files += 1
                hits += [file] if b"Canary-Marker" in file.read_bytes() else []
    assert files > 10
    assert hits == []


def test_row_44_configuration_error_at_start(stage: Stage, figure: Figure) -> None:
    """The next supervisor refuses to start; gateway and workers go on and are adopted once it can."""
    lmx = stage.lmx
    before, gateway = pids(lmx), gateway_of(lmx)
    with undisturbed(lmx):
        lmx.kill_supervisor()
        (lmx.home / "lmx.toml").write_text("[gateway]\n\nport = 'x'\n")
        began = time.monotonic()
        done = lmx.cli("run", check=False)
        figure("row 44", "refused with words", time.monotonic() - began, target=1.0)
        assert time.monotonic() - began < 30  # most of it is the start of Python
        assert done.returncode == 5
        assert "lmx.toml:3" in done.stderr
        (lmx.home / "lmx.toml").unlink()
        lmx.start()
        lmx.wait_status(lambda doc: [m["state"] for m in doc["models"]] == ["ready"] * len(before))
    assert (pids(lmx), gateway_of(lmx)["pid"]) == (before, gateway["pid"])
