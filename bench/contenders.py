"""Who is compared: the engine in-process, LMX, and the servers people use today. All get the same matrix library."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import msgspec

from bench.host import Host
from bench.measures import Meter
from bench.workloads import Workload
from supervisor.environment import worker_environment
from supervisor.platform.blas import Preload

Measured = dict[str, Any]

_READY_S: Final = 180.0
_POLL_S: Final = 0.1
_MODEL: Final = "bench"


class ContenderFailedError(Exception):
    """One does not start, or does not answer."""


def last_line(output: str) -> str:
    """Return the last line of what a program has said: of a traceback, what went wrong."""
    return (output.strip().splitlines() or ["it has said nothing"])[-1][-500:]


class Contender:
    """Something that generates, measured by wall clock and by the CPU seconds of each of its processes."""

    name = ""
    #: Whether it can be asked for vectors.
    embeds = False

    def __init__(self, folder: Path, preload: Preload | None, blas_threads: int) -> None:
        self._folder = folder
        self._environ = worker_environment(os.environ, preload, blas_threads)
        self._blas_threads = blas_threads
        self.started = False

    def start(self) -> None:
        """Bring it up; raise `ContenderFailedError`."""
        if not self.started:
            self._start()
            self.started = True

    def close(self) -> None:
        """End what was started."""
        if self.started:
            self.started = False
            self._close()

    def measure(self, workload: Workload) -> Measured:
        """Run a workload; return what `bench.load.summary` returns, and what `Meter.stop` adds to it."""
        meter = Meter(self.pids())
        measured = self._run(workload)
        return {**measured, **meter.stop(measured.pop("client_cpu_s"))}

    def pids(self) -> dict[str, int]:
        """Return its processes by what they are."""
        raise NotImplementedError

    def _start(self) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError

    def _run(self, workload: Workload) -> Measured:
        raise NotImplementedError


class InProcess(Contender):
    """`bench.inprocess`: one process for all rounds, with the environment of a worker."""

    def __init__(self, folder: Path, preload: Preload | None, blas_threads: int, *, lean: bool) -> None:
        super().__init__(folder, preload, blas_threads)
        self.name = "in-process, lean" if lean else "in-process"
        self._kind = "lean" if lean else "plain"
        self._process: subprocess.Popen[str] | None = None

    def _start(self) -> None:
        command = [sys.executable, "-P", "-m", "bench.inprocess", str(self._folder), self._kind]
        self._process = subprocess.Popen(
            command, env=self._environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def pids(self) -> dict[str, int]:
        """Return the one process."""
        assert self._process is not None
        return {"engine": self._process.pid}

    def _run(self, workload: Workload) -> Measured:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(msgspec.json.encode(workload).decode() + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise ContenderFailedError(f"{self.name} has ended: {last_line(process.communicate()[1])}")
        measured: Measured = msgspec.json.decode(line)
        return measured

    def _close(self) -> None:
        assert self._process is not None
        self._process.kill()  # it may be in the middle of a long measurement
        self._process.communicate()


class Served(Contender):
    """Whatever is asked over HTTP, by `bench.load` in a process of its own."""

    #: The name it knows the model by.
    model = _MODEL
    #: Sent with each request, if it is not empty.
    key = ""

    @property
    def url(self) -> str:
        """Where it serves."""
        raise NotImplementedError

    def _run(self, workload: Workload) -> Measured:
        given = msgspec.json.encode(workload).decode()
        command = [sys.executable, "-P", "-m", "bench.load", self.url, self.model, given]
        environ = {**os.environ, "LMX_BENCH_KEY": self.key}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environ)
        if done.returncode:
            raise ContenderFailedError(f"{self.name}: the client failed: {last_line(done.stderr)}")
        measured: Measured = msgspec.json.decode(done.stdout)
        return measured


class Lmx(Served):
    """LMX as it is shipped: supervisor, gateway and worker."""

    name = "LMX"
    embeds = True
    #: `LMX_SECTION__KEY` variables that differ from the defaults.
    settings: Mapping[str, str] = MappingProxyType({})

    def _start(self) -> None:
        self._host = Host(LMX_WORKER__BLAS_THREADS=str(self._blas_threads), **self.settings)
        try:
            self._host.start().load(self._folder, _MODEL)
            self._url = self._host.url
        except BaseException:  # also when the bench is told to end
            self._host.close()
            raise

    @property
    def url(self) -> str:
        """Where the gateway serves."""
        return self._url

    def pids(self) -> dict[str, int]:
        """Return worker, gateway and supervisor."""
        return self._host.pids()

    def _close(self) -> None:
        self._host.close()


class Peer(Served):
    """Another server: one process, with its output in a file."""

    def __init__(self, folder: Path, preload: Preload | None, blas_threads: int) -> None:
        super().__init__(folder, preload, blas_threads)
        self._environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.model = str(folder)

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://127.0.0.1:{self._port}"

    def pids(self) -> dict[str, int]:
        """Return the one process."""
        assert self._process is not None
        return {"server": self._process.pid}

    def command(self, port: int) -> list[str]:
        """Return how it is started."""
        raise NotImplementedError

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has failed
        self._process = subprocess.Popen(
            self.command(self._port),
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
        )
        try:
            self._wait_until_it_serves()
        except BaseException:  # also when the bench is told to end
            self._close()
            raise

    def _wait_until_it_serves(self) -> None:
        assert self._process is not None
        end = time.monotonic() + _READY_S
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/v1/models", timeout=5):
                return
            time.sleep(_POLL_S)
        raise ContenderFailedError(f"{self.name} does not start: {self._tail()}")

    def _close(self) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def _tail(self) -> str:
        self._output.seek(0)
        return last_line(self._output.read().decode(errors="replace"))


#: As our worker does: the compiler that mx.compile starts must not get the matrix library.
_WITHOUT_PRELOAD: Final = "import os, sys; os.environ.pop('LD_PRELOAD', None); "


class MlxLmServer(Peer):
    """`mlx_lm.server` of this environment, with the batch sizes of its own defaults (32 and 8, as ours)."""

    name = "mlx_lm.server"

    def command(self, port: int) -> list[str]:
        """Return how it is started."""
        program = _WITHOUT_PRELOAD + "import runpy; runpy.run_module('mlx_lm.server', run_name='__main__')"
        options = ["--model", str(self._folder), "--port", str(port), "--log-level", "ERROR"]
        return [sys.executable, "-P", "-c", program, *options]


class VllmMlx(Peer):
    """`vllm-mlx` in an environment of its own: `scripts/bench-peers` makes it."""

    name = "vllm-mlx"

    def __init__(self, folder: Path, preload: Preload | None, blas_threads: int, python: Path) -> None:
        super().__init__(folder, preload, blas_threads)
        self._python = python

    def command(self, port: int) -> list[str]:
        """Return how it is started."""
        program = _WITHOUT_PRELOAD + "from vllm_mlx.cli import main; main()"
        options = ["serve", str(self._folder), "--port", str(port), "--continuous-batching", "--offline"]
        return [str(self._python), "-P", "-c", program, *options]
