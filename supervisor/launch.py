"""How each kind of process is started: its spec file, environment and output file."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from protocol.config import Config, ModelsConfig
from protocol.config_load import BadConfigError
from protocol.logs import event
from protocol.paths import Home
from protocol.spec import GatewaySpec, MemoryLimits, SpareSpec, WorkerSpec, read_spec, write_spec
from supervisor.adminkey import VARIABLE, admin_digest
from supervisor.children import Child, spawn
from supervisor.environment import worker_environment
from supervisor.platform.base import Platform
from supervisor.platform.blas import Preload

SPARE: Final = "spare"
_DEGRADED_PREFILL_TOKENS: Final = 128

Limits = Callable[[str], MemoryLimits]
Gone = Callable[[int | None], None]


class Launcher:
    """Starts gateways and workers of one home. `gone` is called with the exit status, None if it is not known."""

    def __init__(self, home: Home, config: Config, platform: Platform) -> None:
        self._home = home
        self._config = config
        self._platform = platform
        #: What MLX is told to keep to in the process of a model.
        self.limits: Limits = lambda _model: MemoryLimits()
        self.preload: Preload | None = platform.preload(home.run / "lib") if config.worker.preload_blas else None

    def gateway(self, name: str, incarnation: int, listen_fd: int, gone: Gone) -> Child:
        """Start a gateway on an open listening socket; raise `OSError` if the system refuses."""
        home, config = self._home, self._config
        file = home.spec(name, incarnation)
        spec = GatewaySpec(
            incarnation=incarnation,
            listen_fd=listen_fd,
            control_socket=str(home.control_socket),
            log_file=str(home.logs / f"{name}.log"),
            log_level=config.log.level,
            gateway=config.gateway,
            lifecycle=config.lifecycle,
            security=config.security,
            limits=config.limits,
            admin_digest=self._admin_digest(),
            keys_file=str(home.keys),
            audit=config.audit,
            audit_file=str(home.audit) if config.audit.enabled else "",
            tracing=config.tracing,
        )
        output = home.logs / f"{name}.out"
        with _handed(file, spec) as (path_argument, spec_fds):
            return spawn(
                self._platform,
                "gateway",
                [path_argument],
                output=output,
                environ=self._environ(),
                gone=gone,
                pass_fds=(listen_fd, *spec_fds),
            )

    def is_current(self, name: str, incarnation: int) -> bool:
        """Return whether a gateway that runs lets in whom the present configuration lets in."""
        try:
            spec = read_spec(self._home.spec(name, incarnation), GatewaySpec)
        except (OSError, msgspec.MsgspecError):
            return False
        present = (self._config.security, self._config.limits, self._admin_digest())
        return (spec.security, spec.limits, spec.admin_digest) == present

    def worker(self, name: str, incarnation: int, model: str, path: str, gone: Gone, *, degraded: bool) -> Child:
        """Start the worker of a model; raise `OSError` if the system refuses."""
        spec = self.worker_spec(name, incarnation, model, path, degraded=degraded)
        output = self._home.logs / f"{name}.out"
        module, environ = self._config.worker.module, self._worker_environ()
        with _handed(self._home.spec(name, incarnation), spec) as (argument, fds):
            return spawn(self._platform, module, [argument], output=output, environ=environ, gone=gone, pass_fds=fds)

    def spare(self, incarnation: int, gone: Gone) -> Child:
        """Start a worker that has no model yet; raise `OSError` if the system refuses."""
        home, config = self._home, self._config
        file = home.spec(SPARE, incarnation)
        spec = SpareSpec(
            incarnation=incarnation,
            control_socket=str(home.control_socket),
            log_file=str(home.logs / f"{SPARE}.log"),
            log_level=config.log.level,
            lifecycle=config.lifecycle,
        )
        output = home.logs / f"{SPARE}.out"
        module, environ = config.worker.module, self._worker_environ()
        with _handed(file, spec) as (argument, fds):
            arguments = ["--spare", argument]
            return spawn(self._platform, module, arguments, output=output, environ=environ, gone=gone, pass_fds=fds)

    def worker_spec(self, name: str, incarnation: int, model: str, path: str, *, degraded: bool) -> WorkerSpec:
        """Return what a worker is told."""
        home, config = self._home, self._config
        return WorkerSpec(
            slot=name,
            model=model,
            incarnation=incarnation,
            path=path,
            endpoint=str(home.endpoint(name, incarnation)),
            control_socket=str(home.control_socket),
            log_file=str(home.logs / f"{name}.log"),
            log_level=config.log.level,
            models=less(config.models) if degraded else config.models,
            lifecycle=config.lifecycle,
            preloaded=self.preload.library if self.preload is not None else "",
            output_file=str(home.logs / f"{name}.out"),
            memory=self._memory(model, degraded=degraded),
            prefix_folder=str(home.cache) if config.prefix.disk else "",
            prefix_disk_bytes=config.prefix.disk_bytes,
            tracing=config.tracing,
        )

    def _memory(self, model: str, *, degraded: bool) -> MemoryLimits:
        """Return what the worker keeps to. A degraded one keeps no prefixes: they may be what it died of."""
        limits = self.limits(model)
        return msgspec.structs.replace(limits, prefix_bytes=0) if degraded else limits

    def _worker_environ(self) -> dict[str, str]:
        # MLX keeps what it compiles for the CPU under a predictable name in the temporary folder: not a shared one.
        temporary = self._home.run / "tmp"
        temporary.mkdir(mode=0o700, exist_ok=True)
        environ = {**self._environ(), "TMPDIR": str(temporary)}
        threads = self._config.worker.blas_threads or max(1, (os.cpu_count() or 2) // 2)
        return worker_environment(environ, self.preload, threads)

    def _environ(self) -> dict[str, str]:
        environ = {**os.environ, "LMX_HOME": str(self._home.root)}
        environ.pop(VARIABLE, None)  # a digest is all that anybody else needs
        return environ

    def _admin_digest(self) -> str:
        """Return what a gateway compares with; nothing, which opens no admin route, if there is no usable key."""
        try:
            return admin_digest(self._home.admin_key)
        except (BadConfigError, OSError) as error:
            event("admin_key_unusable", level="ERROR", reason=str(error))
            return ""


@contextlib.contextmanager
def _handed(file: Path, spec: msgspec.Struct) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the argument by which a process finds its spec, and the descriptors it needs for that.

    It is a file, for people to read; through a pipe where no file can be written: a full disk stops no model.
    """
    try:
        write_spec(file, spec)
    except OSError as error:
        event("spec_not_written", level="WARNING", file=file.name, reason=error.strerror)
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    else:
        yield str(file), ()
        return
    reader, writer = os.pipe()
    try:
        try:
            os.set_blocking(writer, False)
            content = msgspec.json.encode(spec)
            if os.write(writer, content) < len(content):
                raise OSError(errno.EMSGSIZE, "the spec is longer than a pipe")
        finally:
            os.close(writer)
        yield f"/dev/fd/{reader}", (reader,)
    finally:
        os.close(reader)


def less(models: ModelsConfig) -> ModelsConfig:
    """Return the settings of a degraded worker: one request at a time, small prefill chunks."""
    prefill = min(models.prefill_step_tokens, _DEGRADED_PREFILL_TOKENS)
    return msgspec.structs.replace(models, max_concurrent_requests=1, prefill_step_tokens=prefill)
