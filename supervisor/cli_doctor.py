"""`lmx-supervisor doctor`: looks for what would keep LMX from serving well, with or without a running supervisor."""

import json
import shutil
import sys
from collections.abc import Iterator
from typing import Any, Final

import click

from protocol.config import Config
from protocol.config_load import BadConfigError, load_config
from protocol.paths import Home, UnsafeHomeError
from protocol.states import CliExit
from supervisor.client import Client, UnreachableError
from supervisor.platform import launchd
from supervisor.thermal import find_macmon

_LOW_DISK_BYTES: Final = 2 * 1024**3

#: (id, "ok" | "warning" | "error", words)
Finding = tuple[str, str, str]


def examine(home: Home) -> Iterator[Finding]:
    """Yield a finding per check; starts nothing, and makes at most the folders of the home."""
    config = Config()
    try:
        home.ensure()
        yield "home", "ok", str(home.root)
    except UnsafeHomeError as error:
        yield "home", "error", str(error)
    try:
        config = load_config(home.config)
        yield _config_file(home)
    except BadConfigError as error:
        yield "config", "error", str(error)
    yield from _disk(home)
    yield from _supervisor(home)
    printed = launchd.printed_job()
    found = launchd.problems(printed, launchd.stop_seconds(config.lifecycle))
    yield from (("job", "warning", problem) for problem in found)
    if not found:
        yield "job", "ok", "launchd runs it as it should" if printed else "not run by launchd"
    macmon = find_macmon(config.thermal.macmon) if config.thermal.macmon else None
    yield "thermal", "ok", macmon or "unknown: no macmon (optional; on a Mac: brew install macmon)"


def _config_file(home: Home) -> Finding:
    """Say which file counts; one that is named otherwise is read by nobody."""
    if home.config.exists():
        return "config", "ok", f"{home.config.name} can be read"
    others = sorted(path.name for path in home.root.glob("*.toml"))
    if others:
        return "config", "warning", f"{', '.join(others)}: not read; the file has to be named {home.config.name}"
    return "config", "ok", f"no {home.config.name}: all is as it comes"


def _disk(home: Home) -> Iterator[Finding]:
    try:
        free = shutil.disk_usage(home.root if home.root.exists() else home.root.parent).free
    except OSError:
        return
    words = f"{free / 1024**3:.1f} GiB free"
    yield "disk", "ok" if free >= _LOW_DISK_BYTES else "warning", words


def _supervisor(home: Home) -> Iterator[Finding]:
    try:
        client = Client(home)
    except UnreachableError:
        yield "supervisor", "warning", "does not run: lmx-supervisor run"
        return
    try:
        document: dict[str, Any] = json.loads(client.status())
    finally:
        client.close()
    down = [model["id"] for model in document["models"] if model["state"] != "ready"]
    slow = [model["id"] for model in document["models"] if model.get("slow")]
    yield "supervisor", "ok", f"pid {document['supervisor']['pid']}"
    if down:
        yield "models", "warning", f"not ready: {', '.join(down)}; see lmx-supervisor status"
    if slow:
        yield "speed", "warning", f"slower than half of what they were here: {', '.join(slow)}; is the GPU held back?"


def show(home: Home, *, as_json: bool) -> None:
    """Print the findings; exit 1 if there is an error among them."""
    findings = list(examine(home))
    if as_json:
        checks = [{"id": name, "status": status, "message": words} for name, status, words in findings]
        click.echo(json.dumps({"schema": "lmx.doctor/1", "checks": checks}, indent=2))
    else:
        for name, status, words in findings:
            click.echo(f"{status:<8} {name:<11} {words}")
    sys.exit(CliExit.FAILED if any(status == "error" for _, status, _ in findings) else CliExit.OK)
