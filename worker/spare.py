"""A worker that has imported everything and waits for a model: it takes the imports out of every recovery."""

import importlib
import os
import socket
import sys
import time
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from protocol import PROTOCOL_VERSION, __version__
from protocol.control import MAX_FRAME_BYTES, Assign, Heartbeat, Ping, SpareHello, Stop, from_supervisor_decoder
from protocol.framing import FrameBuffer, FrameTooLargeError, frame
from protocol.logs import event, setup_logging
from protocol.messages import MalformedMessageError, encode
from protocol.spec import SpareSpec, WorkerSpec, read_spec
from protocol.states import Phase, WorkerExit
from worker.io_thread import IoThread
from worker.process import Load, dump_stacks_when_asked, leave, run

#: What loading a model needs, and takes most of the two seconds that a recovery would otherwise wait for.
_IMPORTS: Final = ("mlx.core", "mlx_lm.utils", "mlx_lm.models.cache", "worker.batch", "worker.prompt", "transformers")
_REDIAL_S: Final = 0.1
_READ_BYTES: Final = 64 * 1024


class _ConnectionLostError(Exception):
    """The supervisor is gone, or is not one we can talk to."""


def main(argv: list[str], load: Load) -> NoReturn:
    """Run the spare that `argv` names (`--spare SPEC`) until it is given a model, then be that model's worker."""
    dump_stacks_when_asked()
    try:
        spec = read_spec(Path(argv[2]), SpareSpec)
    except (IndexError, OSError, msgspec.MsgspecError, UnicodeDecodeError):
        sys.stderr.write("usage: python -m worker --spare SPEC.json\n")
        sys.exit(WorkerExit.BAD_CONFIG)
    setup_logging("spare", file=Path(spec.log_file), terminal=False, level=spec.log_level)
    # A model is a folder: nothing here may ask a network for anything.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for module in _IMPORTS:
        importlib.import_module(module)
    event("spare_ready", incarnation=spec.incarnation)
    worker = _wait_for_model(spec)
    _move_output(worker.output_file)
    setup_logging(f"worker:{worker.slot}", file=Path(worker.log_file), terminal=False, level=worker.log_level)
    run(worker, load, IoThread)


def _wait_for_model(spec: SpareSpec) -> WorkerSpec:  # noqa: RET503 - the last line does not return
    """Return the assigned spec; end the process when asked to, or when no supervisor is heard for the lease."""
    give_up_at = time.monotonic() + spec.lifecycle.lease_s
    while time.monotonic() < give_up_at:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(spec.lifecycle.lease_s)
                sock.connect(spec.control_socket)
                sock.sendall(frame(encode(SpareHello(PROTOCOL_VERSION, spec.incarnation, os.getpid(), __version__))))
                give_up_at = time.monotonic() + spec.lifecycle.lease_s
                return _listen(sock)
        except (_ConnectionLostError, OSError):
            time.sleep(_REDIAL_S)
    event("lease_expired", level="WARNING")
    leave(WorkerExit.LEASE_EXPIRED)


def _listen(sock: socket.socket) -> WorkerSpec:
    decoder, frames = from_supervisor_decoder(), FrameBuffer(MAX_FRAME_BYTES)
    while True:
        data = sock.recv(_READ_BYTES)
        if not data:
            raise _ConnectionLostError
        try:
            for body in frames.feed(data):
                match decoder.decode(body):
                    case Assign(spec):
                        return msgspec.json.decode(spec, type=WorkerSpec)
                    case Stop():
                        leave(WorkerExit.ASKED)
                    case Ping():
                        sock.sendall(frame(encode(Heartbeat(Phase.IDLE, 0, 0.0, 0, 0, 0, 0, 0))))
        except (FrameTooLargeError, MalformedMessageError, msgspec.MsgspecError):
            raise _ConnectionLostError from None


def _move_output(file: str) -> None:
    """Point stdout and stderr at the worker's own file."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
