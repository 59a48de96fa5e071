"""`lmx-supervisor`: what operators type. stdout is data, stderr is progress, exit codes are `CliExit`."""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Final, NoReturn, ParamSpec

import click
import msgspec

from protocol import __version__, control
from protocol.messages import Message
from protocol.paths import Home, UnsafeHomeError, default_home, expanded
from protocol.states import CliExit
from supervisor.cli_audit import audit
from supervisor.cli_keys import keys
from supervisor.client import Client, UnreachableError, WaitedTooLongError

_COMMAND_S: Final = 960.0
_STOP_S: Final = 400.0
_WATCH_S: Final = 1.0
_UPGRADE_S: Final = 60.0
_POLL_S: Final = 0.05
P = ParamSpec("P")


def main() -> None:
    """Run the command line."""
    cli.main(prog_name="lmx-supervisor")


def _fail(message: str, code: CliExit = CliExit.FAILED) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


def _reports(command: Callable[P, None]) -> Callable[P, None]:
    """Turn what can go wrong between us and the supervisor into words and an exit code."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except UnreachableError as error:
            _fail(f"{error}; start it with: lmx-supervisor run", CliExit.UNREACHABLE)
        except WaitedTooLongError as error:
            _fail(str(error), CliExit.TIMED_OUT)
        except BrokenPipeError:
            sys.exit(CliExit.OK)

    return wrapped


@click.group()
@click.version_option(__version__)
@click.option("--home", type=click.Path(path_type=Path), help="Folder of all state [$LMX_HOME, else ~/.lmx].")
@click.pass_context
def cli(context: click.Context, home: Path | None) -> None:
    """A local LLM server that does not fall over: each model in a process of its own, supervised."""
    try:
        context.obj = Home(expanded(home) if home else default_home())
    except UnsafeHomeError as error:
        _fail(str(error), CliExit.BAD_CONFIG)


cli.add_command(keys)
cli.add_command(audit)


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
@_reports
def status(home: Home, as_json: bool, watch: bool) -> None:
    """Show the supervisor, the gateway and every model. Exit 3 if a model that should serve does not."""
    try:
        client = Client(home)
    except UnreachableError as error:
        _last_words(home, as_json=as_json)
        _fail(str(error), CliExit.UNREACHABLE)
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
@click.argument("model")
@click.option("--id", "model_id", help="Name to serve it under [its id, repository or folder name].")
@click.option("--pin", is_flag=True, help="Never unload it to make room or for being idle.")
@click.option("--ttl", type=click.FloatRange(0), metavar="SECONDS", help="Unload it after so long idle; 0 never.")
@click.pass_obj
@_reports
def load(home: Home, model: str, model_id: str | None, pin: bool, ttl: float | None) -> None:
    """Load MODEL: an id, a folder or a Hugging Face repository. Returns when it is ready."""
    ref = _fetched(home, model)
    _command(home, control.LoadRequest(model_id or ref.id, str(ref.folder), pin, ttl))


@cli.command()
@click.argument("model")
@click.option("--id", "model_id", help="Name it would be served under [its id, repository or folder name].")
@click.option("--json", "as_json", is_flag=True, help="Print the document lmx.fit/1.")
@click.pass_obj
@_reports
def fit(home: Home, model: str, model_id: str | None, as_json: bool) -> None:
    """Say whether MODEL, which is here already, would fit into memory, and what a load would unload for it."""
    from supervisor.cli_memory import show_fit
    from supervisor.modelref import UnknownModelError, resolve

    try:
        ref = resolve(model, home)
    except UnknownModelError as error:
        _fail(str(error))
    show_fit(home, model_id or ref.id, str(ref.folder), as_json=as_json)


@cli.command()
@click.argument("model")
@click.pass_obj
@_reports
def pin(home: Home, model: str) -> None:
    """Never unload MODEL to make room for another or for being idle."""
    _command(home, control.PinRequest(model, pinned=True))


@cli.command()
@click.argument("model")
@click.pass_obj
@_reports
def unpin(home: Home, model: str) -> None:
    """Let MODEL be unloaded again to make room or for being idle."""
    _command(home, control.PinRequest(model, pinned=False))


@cli.command()
@click.argument("model")
@click.pass_obj
@_reports
def pull(home: Home, model: str) -> None:
    """Fetch MODEL into the models folder, without loading it. Does nothing if it is there."""
    click.echo(_fetched(home, model).folder)


@cli.command("import")
@click.argument("gguf", type=click.Path(path_type=Path))
@click.option("--to", type=click.Path(path_type=Path), help="Folder to write [models/NAME].")
@click.pass_obj
def import_(home: Home, gguf: Path, to: Path | None) -> None:
    """Import a llama-family GGUF file into an MLX model folder."""
    from supervisor.modelref import run_tool

    _ensure(home)
    folder = to or home.models / gguf.stem.lower()
    if not run_tool(["import", str(gguf), "--to", str(folder)], home):
        sys.exit(CliExit.FAILED)
    click.echo(folder)


@cli.command()
@click.argument("model")
@click.pass_obj
@_reports
def unload(home: Home, model: str) -> None:
    """Let MODEL's requests end, end its process, and keep it unloaded."""
    _command(home, control.UnloadRequest(model))


@cli.command("restart-worker")
@click.argument("model")
@click.option("--force", is_flag=True, help="Do not wait for running requests.")
@click.pass_obj
@_reports
def restart_worker(home: Home, model: str, force: bool) -> None:
    """Replace MODEL's process; returns when the new one is ready. No other model is touched."""
    _command(home, control.RestartRequest(model, force))


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
@_reports
def doctor(home: Home, as_json: bool) -> None:
    """Look for what would keep LMX from serving well. Exit 1 if something is broken."""
    from supervisor.cli_doctor import show

    show(home, as_json=as_json)


@cli.command()
@click.argument("model")
@click.pass_obj
@_reports
def reset(home: Home, model: str) -> None:
    """Forget MODEL's failures; if it was set aside, start it again."""
    _command(home, control.ResetRequest(model))


@cli.command()
@click.pass_obj
@_reports
def resume(home: Home) -> None:
    """Leave safe mode and load what should be live."""
    _command(home, control.ResumeRequest())


@cli.command()
@click.argument("model")
@click.option("--streams", default="1,4,16", show_default=True, help="Clients at a time, several numbers with commas.")
@click.option("--tokens", default=128, show_default=True, help="Tokens of each answer.")
@click.option("--rounds", default=3, show_default=True, help="Rounds, in alternating order.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for report.md, report.json and plots.")
@click.pass_obj
@_reports
def bench(home: Home, model: str, streams: str, tokens: int, rounds: int, out: Path | None) -> None:
    """Measure MODEL on this machine: LMX beside the same engine in-process and mlx_lm.server.

    An LMX of its own, in a home of its own, so nothing that runs is touched; but memory and processor are shared.
    """
    folder = _fetched(home, model).folder
    options = ["--model", str(folder), "--streams", streams, "--tokens", str(tokens), "--rounds", str(rounds)]
    options += ["--out", str(out)] if out else []
    # Another program, which may speak HTTP: nothing of it is loaded here.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "bench", *options])


@cli.command()
@click.pass_obj
@_reports
def upgrade(home: Home) -> None:
    """Replace supervisor and gateway by the installed version in place; models and requests go on."""
    before = _status_of(home)["gateway"]["incarnation"]
    _command(home, control.HandoverRequest())
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
@_reports
def stop(home: Home) -> None:
    """Let running requests end, end every process, and wait until the supervisor is gone."""
    client = Client(home)
    for message in client.ask(control.StopRequest(), within_s=_STOP_S):
        if isinstance(message, control.Result):
            break
    client.wait_closed(within_s=_STOP_S)
    click.echo("stopped")


def _command(home: Home, request: Message) -> None:
    from supervisor.progress import show_progress

    client = Client(home)
    with show_progress() as progress:
        for message in client.ask(request, within_s=_COMMAND_S):
            if isinstance(message, control.Progress):
                progress(message)
            if isinstance(message, control.Result):
                break
    if not isinstance(message, control.Result) or message.exit_code != CliExit.OK:
        words = message.message if isinstance(message, control.Result) else "no answer"
        code = message.exit_code if isinstance(message, control.Result) else CliExit.FAILED
        _fail(words, CliExit(code))
    click.echo(message.message)


def _fetched(home: Home, model: str) -> Any:
    from supervisor.modelref import UnknownModelError, fetch, resolve

    _ensure(home)
    try:
        ref = resolve(model, home)
    except UnknownModelError as error:
        _fail(str(error))
    if not fetch(ref, home):
        sys.exit(CliExit.FAILED)  # the tool has said why
    return ref


def _ensure(home: Home) -> None:
    try:
        home.ensure()
    except UnsafeHomeError as error:
        _fail(str(error), CliExit.BAD_CONFIG)


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
