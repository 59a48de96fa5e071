"""Runs a real LMX on a home of its own, drives it by its command line, and checks that nothing is left of it."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.host import HostFailedError, environment_of, journal_of, status_of

WAIT_S = 60.0
POLL_S = 0.02

#: Deadlines and delays scaled down for tests.
FAST = {
    "LMX_LIFECYCLE__RESTART_DELAYS_S": "[0.0, 0.1, 0.2, 0.5, 1.0]",
    "LMX_LIFECYCLE__STOP_MIN_S": "3",
    "LMX_LIFECYCLE__DRAIN_S": "5",
}


class Lmx:
    """One supervisor with its gateway and workers. `settings` are `LMX_SECTION__KEY` variables."""

    def __init__(self, **settings: str) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="lmx-", dir="/tmp"))
        self.environ = environment_of(self.home, {"LMX_WORKER__BLAS_THREADS": "1", **FAST, **settings})
        self.process: subprocess.Popen[bytes] | None = None
        self.output = self.home / "terminal.txt"

    # -- the supervisor ---------------------------------------------------------------------------------------

    def start(self, *, wait: bool = True, **settings: str) -> "Lmx":
        """Start a supervisor; return once its gateway serves."""
        with self.output.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "supervisor", "run"],
                env={**self.environ, **settings},
                stdout=stream,
                stderr=stream,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        if wait:
            self.wait_status(lambda doc: doc["gateway"] is not None and doc["gateway"]["state"] == "ready")
        return self

    def kill_supervisor(self) -> None:
        """End the supervisor as a crash would; its children live on."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(WAIT_S)

    def kill_everything(self) -> None:
        """End the supervisor and whatever it started, as a loss of power would; return once none of it lives."""
        self.kill_supervisor()
        left = self._kill_rest(WAIT_S)
        assert not left, left

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask the supervisor to end and return its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)

    def close(self) -> None:
        """End whatever is left and remove the home; fail if a process outlived a supervisor that ended well."""
        left: list[str] = []
        if self._runs():
            self.stop()
            left = [repr(process) for process in self.processes()]
        self._kill_rest(10)
        shutil.rmtree(self.home, ignore_errors=True)
        assert not left, f"left behind: {left}"

    def processes(self) -> list[psutil.Process]:
        """Return every living process of this home, whoever its parent is."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = self._runs() and self.process is not None and process.pid == self.process.pid
                if ours or (process.status() != psutil.STATUS_ZOMBIE and str(self.home) in " ".join(process.cmdline())):
                    found.append(process)
        return found

    def _kill_rest(self, within_s: float) -> list[psutil.Process]:
        """Kill whatever lives until none does, since a signal takes its time; return what is left then."""
        for _ in deadline(within_s):
            living = self.processes()
            if not living:
                return []
            for process in living:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        return self.processes()

    def _runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    # -- the command line ---------------------------------------------------------------------------------------

    def cli(self, *arguments: str, check: bool = True, within_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run one command of `lmx-supervisor`."""
        done = subprocess.run(
            [sys.executable, "-m", "supervisor", *arguments],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=within_s,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert not check or done.returncode == 0, (done.args, done.returncode, done.stdout, done.stderr, self.tail())
        return done

    def load(self, folder: Path, model: str) -> None:
        """Load a model folder and wait until it is ready."""
        self.cli("load", str(folder), "--id", model)

    def status(self) -> dict[str, Any] | None:
        """Return the status document, None while no supervisor answers."""
        try:
            return status_of(self.home)
        except HostFailedError:
            return None

    def wait_status(self, condition: Callable[[dict[str, Any]], bool], within_s: float = WAIT_S) -> dict[str, Any]:
        """Return the first status document that meets the condition."""
        for _ in deadline(within_s):
            document = self.status()
            if document is not None and condition(document):
                return document
        raise AssertionError((self.status(), self.tail()))

    def model(self, model: str) -> dict[str, Any]:
        """Return one model of the status document."""
        document = self.status()
        assert document is not None
        found: dict[str, Any] = next(entry for entry in document["models"] if entry["id"] == model)
        return found

    def wait_model(self, model: str, state: str = "ready", *, other_than: int = 0, within_s: float = WAIT_S) -> int:
        """Return the model's pid (0 if it has none) once it is in `state` with another incarnation than given."""

        def there(document: dict[str, Any]) -> bool:
            return any(
                entry["id"] == model and entry["state"] == state and entry["incarnation"] != other_than
                for entry in document["models"]
            )

        # Of that very document: in the next one it may be another process's.
        document = self.wait_status(there, within_s)
        return next(int(entry["pid"] or 0) for entry in document["models"] if entry["id"] == model)

    @property
    def url(self) -> str:
        """Where the gateway serves."""
        # A supervisor that took over says it once the gateway has handed it the listening socket.
        document = self.wait_status(lambda document: bool(document["gateway"]["url"]))
        return str(document["gateway"]["url"])

    # -- what it wrote ------------------------------------------------------------------------------------------

    def journal(self) -> list[dict[str, Any]]:
        """Return all lifecycle events."""
        return journal_of(self.home)

    def wait_event(self, name: str, within_s: float = WAIT_S, **fields: object) -> dict[str, Any]:
        """Return the first lifecycle event of that name with those fields."""
        for _ in deadline(within_s):
            for entry in self.journal():
                if entry["event"] == name and all(entry.get(key) == value for key, value in fields.items()):
                    return entry
        raise AssertionError((name, fields, self.tail()))

    def tail(self) -> str:
        """Return the end of what the supervisor said, for a failing test."""
        return self.output.read_text()[-4000:] if self.output.exists() else ""


def deadline(within_s: float) -> Iterator[None]:
    """Yield again and again, a poll interval apart, until the time is over."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        yield
        time.sleep(POLL_S)


def chat(model: str, *, max_tokens: int, stream: bool, text: str = "Hello there", **more: object) -> dict[str, Any]:
    """Return a greedy chat request."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": stream,
        **more,
    }


def without_cached(usage: dict[str, Any] | None) -> dict[str, Any]:
    """Return usage but for the share of the prompt that came from the cache, which may differ from try to try."""
    assert usage is not None
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]
    return {name: value for name, value in usage.items() if name != "prompt_tokens_details"}


class Stream:
    """What came over one SSE stream: texts, the end, and an error event if there was one."""

    def __init__(self) -> None:
        self.status = 0
        self.chunks: list[dict[str, Any]] = []
        self.error: dict[str, Any] | None = None
        self.done = False
        self.broken = ""

    @property
    def text(self) -> str:
        """The whole content."""
        return "".join(c["choices"][0]["delta"].get("content") or "" for c in self.chunks if c["choices"])

    @property
    def finish(self) -> str | None:
        """The finish reason."""
        reasons = [c["choices"][0]["finish_reason"] for c in self.chunks if c["choices"]]
        return next((reason for reason in reversed(reasons) if reason), None)


async def read_stream(
    client: httpx.AsyncClient, body: dict[str, Any], on_chunk: Callable[[Stream], None] = lambda _: None
) -> Stream:
    """Send a streaming chat request and read it to its end, however it ends."""
    result = Stream()
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            result.status = response.status_code
            if response.status_code != 200:
                result.error = json.loads(await response.aread())["error"]
                return result
            event = ""
            async for line in response.aiter_lines():
                if line.startswith("event:"):
                    event = line.removeprefix("event:").strip()
                elif line == "data: [DONE]":
                    result.done = True
                elif line.startswith("data:"):
                    data = json.loads(line.removeprefix("data:"))
                    if event == "error":
                        result.error = data["error"]
                    else:
                        result.chunks.append(data)
                        on_chunk(result)
    except httpx.HTTPError as error:
        result.broken = type(error).__name__
    return result
