"""`lmx-supervisor`: what operators type. stdout is data, stderr is progress, exit codes are `CliExit`."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from protocol import __version__, control
from protocol.paths import Home, UnsafeHomeError, default_home, expanded
from protocol.states import CliExit
from supervisor.cli_audit import audit
from supervisor.cli_common import command, fail, fetched, reports
from supervisor.cli_keys import keys
from supervisor.cli_models import MODEL_COMMANDS
from supervisor.client import Client, UnreachableError, WaitedTooLongError

_STOP_S: Final = 400.0
_WATCH_S: Final = 1.0
_UPGRADE_S: Final = 60.0
_POLL_S: Final = 0.05


def main() -> None:
    """Run the command line."""
    cli.main(prog_name="lmx-supervisor")


@click.group()
@click.version_option(__version__)
@click.option("--home", type=click.Path(path_type=Path), help="Folder of all state [$LMX_HOME, else ~/.lmx].")
@click.pass_context
def cli(context: click.Context, home: Path | None) -> None:
    """A local LLM server that does not fall over: each model in a process of its own, supervised."""
    try:
        context.obj = Home(expanded(home) if home else default_home())
    except UnsafeHomeError as error:
        fail(str(error), CliExit.BAD_CONFIG)


cli.add_command(keys)
cli.add_command(audit)
for _command in MODEL_COMMANDS:
    cli.add_command(_command)


@cli.command()
@click.option("--config", type=click.Path(path_type=Path), help="Configuration file [$LMX_HOME/lmx.toml].")
@click.pass_obj
def run(home: Home, config: Path | None) -> None:
    """Serve in the foreground until stopped by Ctrl-C, SIGTERM or `stop`."""
    from supervisor.running import run_supervisor

    sys.exit(run_supervisor(home, config))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the document lmx.status/1.")
@click.option("--watch", is_flag=True, help="Print again every second, until Ctrl-C.")
@click.pass_obj
@reports
def status(home: Home, as_json: bool, watch: bool) -> None:
    """Show the supervisor, the gateway and every model. Exit 3 if a model that should serve does not."""
    try:
        client = Client(home)
    except UnreachableError as error:
        _last_words(home, as_json=as_json)
        fail(str(error), CliExit.UNREACHABLE)
    while True:
        document = json.loads(client.status())
        if watch and not as_json:
            click.clear()
        _show(document, as_json=as_json)
        if not watch:
            ready = all(model["state"] == "ready" for model in document["models"])
            sys.exit(CliExit.OK if ready else CliExit.NOT_READY)
        try:
            time.sleep(_WATCH_S)
        except KeyboardInterrupt:
            sys.exit(CliExit.OK)


@cli.command()
@click.argument("crash", metavar="[ID]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the document lmx.crashes/1.")
@click.pass_obj
def crashes(home: Home, crash: str | None, as_json: bool) -> None:
    """List the crashes that are kept, or show the one whose ID is given or begins so."""
    from supervisor.cli_crashes import show_crashes

    show_crashes(home, crash, as_json=as_json)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the document lmx.doctor/1.")
@click.pass_obj
@reports
def doctor(home: Home, as_json: bool) -> None:
    """Look for what would keep LMX from serving well. Exit 1 if something is broken."""
    from supervisor.cli_doctor import show

    show(home, as_json=as_json)


@cli.command()
@click.pass_obj
@reports
def resume(home: Home) -> None:
    """Leave safe mode and load what should be live."""
    command(home, control.ResumeRequest())


@cli.command()
@click.argument("model")
@click.option("--streams", default="1,4,16", show_default=True, help="Clients at a time, several numbers with commas.")
@click.option("--tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens of each answer.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds, in alternating order."
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for report.md, report.json and plots.")
@click.pass_obj
@reports
def bench(home: Home, model: str, streams: str, tokens: int, rounds: int, out: Path | None) -> None:
    """Measure MODEL on this machine: LMX beside the same engine in-process and mlx_lm.server.

    An LMX of its own, in a home of its own, so nothing that runs is touched; but memory and processor are shared.
    """
    folder = fetched(home, model).folder
    options = ["--model", str(folder), "--streams", streams, "--tokens", str(tokens), "--rounds", str(rounds)]
    options += ["--out", str(out)] if out else []
    # Another program, which may speak HTTP: nothing of it is loaded here.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "bench", *options])


@cli.command()
@click.pass_obj
@reports
def upgrade(home: Home) -> None:
    """Replace supervisor and gateway by the installed version in place; models and requests go on."""
    before = _status_of(home)["gateway"]["incarnation"]
    command(home, control.HandoverRequest())
    pid = _wait_for_next(home, before)
    click.echo(f"supervisor and gateway replaced (pid {pid})")


def _status_of(home: Home) -> dict[str, Any]:
    client = Client(home)
    try:
        document: dict[str, Any] = json.loads(client.status())
    finally:
        client.close()
    return document


def _wait_for_next(home: Home, old_gateway: int) -> int:
    """Return the supervisor's pid once its next image and a newer gateway than incarnation `old_gateway` serve."""
    end = time.monotonic() + _UPGRADE_S
    while time.monotonic() < end:
        try:
            document = _status_of(home)
            gateway = document["gateway"]
            if (
                document["supervisor"]["handed_over"]
                and gateway["state"] == "ready"
                and gateway["incarnation"] > old_gateway
            ):
                return int(document["supervisor"]["pid"])
        except UnreachableError:
            pass  # between the two images nobody listens
        time.sleep(_POLL_S)
    msg = "the next supervisor is not ready yet: see status"
    raise WaitedTooLongError(msg)


@cli.command()
@click.pass_obj
@reports
def stop(home: Home) -> None:
    """Let running requests end, end every process, and wait until the supervisor is gone."""
    client = Client(home)
    for message in client.ask(control.StopRequest(), within_s=_STOP_S):
        if isinstance(message, control.Result):
            break
    client.wait_closed(within_s=_STOP_S)
    click.echo("stopped")


def _show(document: dict[str, Any], *, as_json: bool) -> None:
    from supervisor.screen import status_text

    click.echo(json.dumps(document, indent=2) if as_json else status_text(document))


class _LastWords(msgspec.Struct):
    saved_at: float
    snapshot: dict[str, Any] | None = None


def _last_words(home: Home, *, as_json: bool) -> None:
    """Print what the last supervisor wrote down, with its age, if it wrote anything."""
    from protocol.statefile import StateFile
    from supervisor.screen import duration

    payload = StateFile(home.state / "runtime", kind="lmx.runtime", schema=1, shape=_LastWords).peek()
    if payload is None or not payload.snapshot:
        return
    age = max(0.0, time.time() - payload.saved_at)
    document = {**payload.snapshot, "snapshot_age_s": round(age, 1)}
    if not as_json:
        click.echo(f"the supervisor does not run; this is from {duration(age)} ago\n")
    _show(document, as_json=as_json)
