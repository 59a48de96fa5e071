"""`python -m gateway SPEC`: serve on the listening socket that SPEC names, until told to stop."""

import asyncio
import contextlib
import faulthandler
import gc
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Final

import msgspec
import uvloop

from gateway.service import Service
from protocol.logs import exception_event, setup_logging
from protocol.spec import GatewaySpec, read_spec
from protocol.states import WorkerExit

#: Descriptors to ask for: launchd gives 256, and each client and each worker needs some.
_MAX_FILES: Final = 10_240


def main(argv: list[str]) -> int:
    """Run the gateway; return its exit code."""
    if len(argv) != 2:
        sys.stderr.write("usage: python -m gateway SPEC\n")
        return WorkerExit.USAGE
    try:
        spec = read_spec(Path(argv[1]), GatewaySpec)
        listener = socket.socket(fileno=spec.listen_fd)
    except (OSError, msgspec.MsgspecError) as error:
        sys.stderr.write(f"gateway: {argv[1]}: {error}\n")
        return WorkerExit.BAD_CONFIG
    setup_logging(
        "gateway",
        file=Path(spec.log_file) if spec.log_file else None,
        terminal=not spec.log_file,
        level=spec.log_level,
    )
    faulthandler.enable()
    # What a supervisor asks for before it ends a gateway that does not move.
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    _set_limits()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_run(spec, listener))
    except Exception as error:  # noqa: BLE001 - the outermost boundary: logged, then the process ends
        exception_event("gateway_crashed", error, part="main")
        return WorkerExit.BUG


async def _run(spec: GatewaySpec, listener: socket.socket) -> int:
    service = Service(spec, listener)
    # What is there now stays for good: a collection that looks at it again holds up every stream for 30 ms.
    gc.freeze()
    return await service.run()


def _set_limits() -> None:
    """No core files, which would hold prompts; as many descriptors as the system allows."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(_MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
