"""What the commands have in common: errors in words with an exit code, and orders to the supervisor."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, Final, NoReturn, ParamSpec

import click

from protocol import control
from protocol.messages import Message
from protocol.paths import Home, UnsafeHomeError
from protocol.states import CliExit
from supervisor.client import Client, UnreachableError, WaitedTooLongError

_COMMAND_S: Final = 960.0
P = ParamSpec("P")


def fail(message: str, code: CliExit = CliExit.FAILED) -> NoReturn:
    """Say what is wrong on stderr and exit."""
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


def reports(body: Callable[P, None]) -> Callable[P, None]:
    """Turn what can go wrong between us and the supervisor into words and an exit code."""

    @wraps(body)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            body(*args, **kwargs)
        except UnreachableError as error:
            fail(f"{error}; start it with: lmx-supervisor run", CliExit.UNREACHABLE)
        except WaitedTooLongError as error:
            fail(str(error), CliExit.TIMED_OUT)
        except BrokenPipeError:
            sys.exit(CliExit.OK)

    return wrapped


def command(home: Home, request: Message) -> None:
    """Have the supervisor do something, show how far it is, and print its answer."""
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
        fail(words, CliExit(code))
    click.echo(message.message)


def ensure(home: Home) -> None:
    """Make the home's folders, or exit with the reason why they cannot be trusted."""
    try:
        home.ensure()
    except UnsafeHomeError as error:
        fail(str(error), CliExit.BAD_CONFIG)


def fetched(home: Home, model: str) -> Any:
    """Return the model that MODEL means, fetched if it is not here; exit if it cannot be."""
    from supervisor.modelref import UnknownModelError, fetch, resolve

    ensure(home)
    try:
        ref = resolve(model, home)
    except UnknownModelError as error:
        fail(str(error))
    if not fetch(ref, home):
        sys.exit(CliExit.FAILED)  # the tool has said why
    return ref
