"""Spec files: what a child process is started from. A worker or gateway can be started by hand from its file."""

from pathlib import Path
from typing import TypeVar

import msgspec

from protocol.config import (
    AuditConfig,
    GatewayConfig,
    LifecycleConfig,
    LimitsConfig,
    ModelsConfig,
    SecurityConfig,
    TracingConfig,
)

SpecT = TypeVar("SpecT", bound=msgspec.Struct)


class MemoryLimits(msgspec.Struct, frozen=True):
    """What MLX is told to keep to, in bytes; 0 leaves its own default. It guides MLX and refuses nothing."""

    memory_bytes: int = 0
    #: Freed buffers that may be kept for reuse, and above what they are cleared every so often.
    buffer_bytes: int = 0
    clear_above_bytes: int = 256 * 1024 * 1024
    clear_every_s: float = 300.0
    #: What the caches of all requests together may take: more is not promised to them. 0 promises everything.
    kv_bytes: int = 0
    #: What may be kept of earlier prompts; 0 keeps nothing.
    prefix_bytes: int = 0


class WorkerSpec(msgspec.Struct, frozen=True):
    """Everything a worker needs: `python -m worker SPEC`."""

    slot: str
    model: str
    incarnation: int
    #: Folder with config.json and safetensors.
    path: str
    #: Where its ROUTER binds.
    endpoint: str
    control_socket: str
    log_file: str
    log_level: str
    models: ModelsConfig
    lifecycle: LifecycleConfig
    #: The matrix library the supervisor asked the loader to preload, "" if none.
    preloaded: str = ""
    #: Where stdout and stderr belong; a spare, which was started before it had a name, moves there.
    output_file: str = ""
    memory: MemoryLimits = MemoryLimits()
    tracing: TracingConfig = TracingConfig()
    #: Where prefixes outlive the process, and how many bytes those of all models may take there; "" is nowhere.
    prefix_folder: str = ""
    prefix_disk_bytes: int = 0


class SpareSpec(msgspec.Struct, frozen=True):
    """A worker without a model yet: `python -m worker --spare SPEC`."""

    incarnation: int
    control_socket: str
    log_file: str
    log_level: str
    lifecycle: LifecycleConfig


class GatewaySpec(msgspec.Struct, frozen=True):
    """Everything a gateway needs: `python -m gateway SPEC`. It serves on an inherited listening socket."""

    incarnation: int
    listen_fd: int
    control_socket: str
    log_file: str
    log_level: str
    gateway: GatewayConfig
    lifecycle: LifecycleConfig
    security: SecurityConfig = SecurityConfig()
    limits: LimitsConfig = LimitsConfig()
    #: SHA-256 of the admin key in hexadecimal; without it nobody passes where that key is needed.
    admin_digest: str = ""
    #: Where the inference keys are; without it there are none.
    keys_file: str = ""
    audit: AuditConfig = AuditConfig()
    #: Where requests are noted; without it they are not.
    audit_file: str = ""
    tracing: TracingConfig = TracingConfig()


def write_spec(file: Path, spec: msgspec.Struct) -> None:
    """Write a spec file, readable by this user only."""
    file.touch(mode=0o600)
    file.write_bytes(msgspec.json.format(msgspec.json.encode(spec)))


def read_spec(file: Path, kind: type[SpecT]) -> SpecT:
    """Return the spec in `file`; raise `OSError` or `msgspec.MsgspecError`."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except (UnicodeDecodeError, RecursionError) as error:  # msgspec's own errors do not cover these
        raise msgspec.DecodeError(str(error)) from None
