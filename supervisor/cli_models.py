"""The commands about one model: fetched, loaded, kept, replaced, unloaded."""

import sys
from pathlib import Path
from typing import Final

import click

from protocol import control
from protocol.paths import Home
from protocol.states import CliExit
from supervisor.cli_common import command, ensure, fail, fetched, reports


@click.command()
@click.argument("model")
@click.option("--id", "model_id", help="Name to serve it under [its id, repository or folder name].")
@click.option("--pin", is_flag=True, help="Never unload it to make room or for being idle.")
@click.option("--ttl", type=click.FloatRange(0), metavar="SECONDS", help="Unload it after so long idle; 0 never.")
@click.pass_obj
@reports
def load(home: Home, model: str, model_id: str | None, pin: bool, ttl: float | None) -> None:
    """Load MODEL: an id, a folder or a Hugging Face repository. Returns when it is ready."""
    ref = fetched(home, model)
    command(home, control.LoadRequest(model_id or ref.id, str(ref.folder), pin, ttl))


@click.command()
@click.argument("model")
@click.option("--id", "model_id", help="Name it would be served under [its id, repository or folder name].")
@click.option("--json", "as_json", is_flag=True, help="Print the document lmx.fit/1.")
@click.pass_obj
@reports
def fit(home: Home, model: str, model_id: str | None, as_json: bool) -> None:
    """Say whether MODEL, which is here already, would fit into memory, and what a load would unload for it."""
    from supervisor.cli_memory import show_fit
    from supervisor.modelref import UnknownModelError, resolve

    try:
        ref = resolve(model, home)
    except UnknownModelError as error:
        fail(str(error))
    show_fit(home, model_id or ref.id, str(ref.folder), as_json=as_json)


@click.command()
@click.argument("model")
@click.pass_obj
@reports
def pin(home: Home, model: str) -> None:
    """Never unload MODEL to make room for another or for being idle."""
    command(home, control.PinRequest(model, pinned=True))


@click.command()
@click.argument("model")
@click.pass_obj
@reports
def unpin(home: Home, model: str) -> None:
    """Let MODEL be unloaded again to make room or for being idle."""
    command(home, control.PinRequest(model, pinned=False))


@click.command()
@click.argument("model")
@click.pass_obj
@reports
def pull(home: Home, model: str) -> None:
    """Fetch MODEL into the models folder, without loading it. Does nothing if it is there."""
    click.echo(fetched(home, model).folder)


@click.command("import")
@click.argument("gguf", type=click.Path(path_type=Path))
@click.option("--to", type=click.Path(path_type=Path), help="Folder to write [models/NAME].")
@click.pass_obj
def import_(home: Home, gguf: Path, to: Path | None) -> None:
    """Import a llama-family GGUF file into an MLX model folder."""
    from supervisor.modelref import run_tool

    ensure(home)
    folder = to or home.models / gguf.stem.lower()
    if not run_tool(["import", str(gguf), "--to", str(folder)], home):
        sys.exit(CliExit.FAILED)
    click.echo(folder)


@click.command()
@click.argument("model")
@click.pass_obj
@reports
def unload(home: Home, model: str) -> None:
    """Let MODEL's requests end, end its process, and keep it unloaded."""
    command(home, control.UnloadRequest(model))


@click.command("restart-worker")
@click.argument("model")
@click.option("--force", is_flag=True, help="Do not wait for running requests.")
@click.pass_obj
@reports
def restart_worker(home: Home, model: str, force: bool) -> None:
    """Replace MODEL's process; returns when the new one is ready. No other model is touched."""
    command(home, control.RestartRequest(model, force))


@click.command()
@click.argument("model")
@click.pass_obj
@reports
def reset(home: Home, model: str) -> None:
    """Forget MODEL's failures; if it was set aside, start it again."""
    command(home, control.ResetRequest(model))


MODEL_COMMANDS: Final = (load, fit, pin, unpin, pull, import_, unload, restart_worker, reset)
