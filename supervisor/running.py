"""`lmx-supervisor run`: checks the ground, takes the lock, runs the daemon, and says when it can be used."""

import asyncio
import faulthandler
import json
import os
import resource
import signal
import sys
from functools import partial
from pathlib import Path

import click

from protocol.config import Config
from protocol.config_load import BadConfigError, load_config
from protocol.logs import event, exception_event, setup_logging
from protocol.paths import Home, UnsafeHomeError
from protocol.profiles import rules
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
    keys_required = rules(config.security, config.limits).keys_required
    daemon = Daemon(
        home, config, partial(_announce, keys_required=keys_required), lambda: _read_config(home, config_file)
    )
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


def try_it(url: str, model: str, *, keys_required: bool) -> str:
    """Return a line for a shell that asks a model something; what stands in it for a key has to be replaced."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "What is the capital of France?"}]})
    key = "-H 'Authorization: Bearer KEY' " if keys_required else ""
    return f"curl {url}/v1/chat/completions {key}-H 'Content-Type: application/json' -d '{body}'"


def _announce(url: str, model: str, *, keys_required: bool) -> None:
    note = " (KEY is what `lmx-supervisor keys create` printed)" if keys_required else ""
    line = try_it(url, model, keys_required=keys_required)
    sys.stdout.write(f"\nLMX serves {model} at {url}/v1\n\nTry it{note}:\n  {line}\n\nStop it with Ctrl-C.\n\n")
    sys.stdout.flush()
