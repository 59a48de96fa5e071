"""`lmx-supervisor fit`, `pin` and `unpin`: what operators ask and say about memory."""

import json
import sys
from typing import Any

import click
import msgspec

from protocol import control
from protocol.paths import Home
from protocol.states import CliExit
from supervisor.client import Client
from supervisor.screen import size

_ANSWER_S = 60.0


def ask_fit(home: Home, model: str, path: str) -> dict[str, Any] | str:
    """Return the document lmx.fit/1, or words why there is none; raise `UnreachableError`."""
    client = Client(home)
    try:
        for message in client.ask(control.FitRequest(model, path), within_s=_ANSWER_S):
            if isinstance(message, control.FitReply):
                document: dict[str, Any] = msgspec.json.decode(message.document)
                return document
            if isinstance(message, control.Result):
                return message.message
    finally:
        client.close()
    return "no answer"


def show_fit(home: Home, model: str, path: str, *, as_json: bool) -> None:
    """Print whether a model folder would fit; exit 1 if a load would be refused."""
    document = ask_fit(home, model, path)
    if isinstance(document, str):
        click.echo(f"error: {document}", err=True)
        sys.exit(CliExit.FAILED)
    click.echo(json.dumps(document, indent=2) if as_json else fit_text(document))
    sys.exit(CliExit.OK if document["loadable"] else CliExit.FAILED)


def fit_text(document: dict[str, Any]) -> str:
    """Return the document for a person."""
    model, need, free = document["model"], size(document["need_bytes"]), size(document["available_bytes"])
    if document["fits"]:
        return f"{model} fits: it needs {need}, {free} are available"
    if document["loadable"] and document["reason"] is None:
        gone = ", ".join(document["would_evict"])
        return f"{model} fits when {gone} is unloaded, which a load would do: it needs {need}, {free} are available"
    return f"{model} does not fit: {document['reason']}"
