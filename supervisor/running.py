"""`lmx-supervisor run`: checks the ground, takes the lock, runs the daemon, and says when it can be used."""

import asyncio
import faulthandler
import json
import os
import resource
import signal
import sys
from pathlib import Path

import click

from protocol.config import Config
from protocol.config_load import BadConfigError, load_config
from protocol.logs import event, exception_event, setup_logging
from protocol.paths import Home, UnsafeHomeError
from protocol.states import CliExit
from supervisor.daemon import Daemon
from supervisor.door import check_door
from supervisor.lock import AlreadyRunningError, HomeLock


def run_supervisor(home: Home, config_file: Path | None) -> CliExit:
    """Run until stopped; return the exit code."""
    os.umask(0o077)
    try:
        config = _read_config(home, config_file)
    except (BadConfigError, UnsafeHomeError) as error:
        click.echo(f"error: {error}", err=True)
        return CliExit.BAD_CONFIG
    try:
        lock = HomeLock(home.lock)
    except (AlreadyRunningError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        return CliExit.FAILED
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold prompts and keys
    # To see where one hangs that answers nobody; without it the signal would end it.
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    setup_logging("supervisor", file=home.logs / "supervisor.log", terminal=True, level=config.log.level)
    daemon = Daemon(home, config, _announce, lambda: _read_config(home, config_file))
    try:
        asyncio.run(daemon.run())
    except Exception as error:  # noqa: BLE001 - the last boundary; launchd starts us again
        exception_event("supervisor_crashed", error)
        return CliExit.FAILED
    finally:
        lock.release()
    if daemon.handing_over:
        event("supervisor_becomes_next_image")
        # The same process, so launchd notices nothing and our children stay ours; the code is read anew.
        os.execv(sys.executable, sys.orig_argv)
    event("supervisor_ended")
    return CliExit.OK


def _read_config(home: Home, config_file: Path | None) -> Config:
    """Return the configuration, of a home and a door that can be served; raise for what cannot."""
    config = load_config(config_file or home.config, required=config_file is not None)
    home.ensure()
    check_door(home, config)
    return config


def _announce(url: str, model: str) -> None:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "What is the capital of France?"}]})
    sys.stdout.write(
        f"\nLMX serves {model} at {url}/v1\n\n"
        f"Try it:\n  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n\n"
        "Stop it with Ctrl-C.\n\n"
    )
    sys.stdout.flush()
