"""An LMX of the bench's own: a home that is removed afterwards, a port that is free, nothing loaded by itself."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from protocol.paths import Home
from supervisor.client import Client, UnreachableError, WaitedTooLongError

_WAIT_S: Final = 120.0
_LOAD_S: Final = 900.0
_POLL_S: Final = 0.02
#: Settings of the user's own; and what would have our code compiled anew at each start, as no user's is.
_NOT_PASSED_ON: Final = ("LMX_", "PYTHONDONTWRITEBYTECODE")
Document = dict[str, Any]


class HostFailedError(Exception):
    """LMX did not do what it was asked; the text has what it said."""


def environment_of(home: Path, settings: Mapping[str, str], *, without: tuple[str, ...] = ("LMX_",)) -> dict[str, str]:
    """Return the environment of an LMX on a home of its own: a port that is free, nothing loaded by itself.

    Of ours all but what begins as in `without` is passed on; `settings` have the last word.
    """
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith(without)},
        "LMX_HOME": str(home),
        "LMX_GATEWAY__PORT": "0",
        "LMX_MODELS__AUTO_LOAD": "[]",
        **settings,
    }


def status_of(home: Path) -> Document:
    """Return the status document. Raises `HostFailedError` while no supervisor answers."""
    try:
        client = Client(Home(home))
        with contextlib.closing(client):
            document: Document = json.loads(client.status())
    except (UnreachableError, WaitedTooLongError) as error:
        raise HostFailedError(str(error)) from None
    return document


def json_lines(file: Path, *, seen: int = 0) -> list[Document]:
    """Return the whole lines of a file that is being written, from byte `seen` on: the last may be there in part."""
    written, _, _ = file.read_bytes()[seen:].rpartition(b"\n")
    return [json.loads(line) for line in written.splitlines()]


def journal_of(home: Path) -> list[Document]:
    """Return all lifecycle events."""
    file = home / "state" / "events.jsonl"
    return json_lines(file) if file.exists() else []


class Host:
    """A supervisor with its gateway and workers. `settings` are `LMX_SECTION__KEY` variables."""

    def __init__(self, **settings: str) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="lmx-bench-", dir="/tmp"))
        settings = {"LMX_LIFECYCLE__STOP_MIN_S": "3", **settings}
        self._environ = environment_of(self._home, settings, without=_NOT_PASSED_ON)
        self._output = self._home / "terminal.txt"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Host":
        """Return once the gateway serves."""
        with self._output.open("ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "supervisor", "run"],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self.wait(lambda document: document["gateway"] is not None and document["gateway"]["state"] == "ready")
        return self

    @property
    def url(self) -> str:
        """Where the gateway serves."""
        return str(self.status()["gateway"]["url"])

    @property
    def home(self) -> Path:
        """Its folder."""
        return self._home

    def load(self, folder: Path, model: str) -> None:
        """Load a model folder and wait until it is ready."""
        self.command("load", str(folder), "--id", model)

    def command(self, *arguments: str) -> str:
        """Run a command of `lmx-supervisor` and return what it printed."""
        done = subprocess.run(
            [sys.executable, "-P", "-m", "supervisor", *arguments],
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=_LOAD_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            raise HostFailedError(f"lmx-supervisor {' '.join(arguments)}: {done.stderr.strip() or self._tail()}")
        return done.stdout

    def status(self) -> Document:
        """Return the status document. Raises `HostFailedError` while no supervisor answers."""
        return status_of(self._home)

    def wait(self, condition: Callable[[Document], bool]) -> Document:
        """Return the first status document that meets the condition."""
        end = time.monotonic() + _WAIT_S
        while time.monotonic() < end:
            if self._process is not None and self._process.poll() is not None:
                break
            with contextlib.suppress(HostFailedError):
                document = self.status()
                if condition(document):
                    return document
            time.sleep(_POLL_S)
        raise HostFailedError(f"LMX did not get ready: {self._tail()}")

    def pids(self) -> dict[str, int]:
        """Return the processes by what they are: supervisor, gateway, worker."""
        document = self.status()
        worker = next((int(model["pid"]) for model in document["models"] if model["pid"]), 0)
        return {
            "worker": worker,
            "gateway": int(document["gateway"]["pid"]),
            "supervisor": int(document["supervisor"]["pid"]),
        }

    def journal(self) -> list[Document]:
        """Return all lifecycle events."""
        return journal_of(self._home)

    def close(self) -> None:
        """End everything and remove the home."""
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_WAIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(self._home, ignore_errors=True)

    def _tail(self) -> str:
        return self._output.read_text()[-2000:].strip() if self._output.exists() else ""
