"""What MODEL means on the command line: an id of the catalog, a folder, or a Hugging Face repository."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import msgspec

from protocol.builtin_models import BUILTIN_MODELS
from protocol.paths import Home
from supervisor.environment import worker_environment
from supervisor.platform import current_platform

_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class UnknownModelError(Exception):
    """MODEL names nothing; the text says what it may be."""


class ModelRef(msgspec.Struct, frozen=True):
    """A model as it was named: its default id, its folder, and what to fetch if the folder is not there."""

    id: str
    folder: Path
    fetch: str | None = None


def resolve(text: str, home: Home) -> ModelRef:
    """Return what `text` means: an id first, then a folder, then a repository."""
    if not text or not _is_unicode(text) or "\0" in text:
        msg = f"{text!r} is not the name of a model"
        raise UnknownModelError(msg)
    # os.path: pathlib raises for names that are too long, folders that are closed to us, "~nobody", loops of links.
    folder = Path(os.path.expanduser(text))  # noqa: PTH111
    if _ID.fullmatch(text) and (text in BUILTIN_MODELS or os.path.isdir(home.models / text)):  # noqa: PTH112
        return ModelRef(text, home.models / text, text if text in BUILTIN_MODELS else None)
    if text.startswith((".", "/", "~")) or os.path.isdir(folder):  # noqa: PTH112
        absolute = folder.absolute()
        return ModelRef(_real_name(absolute), absolute)
    if _REPOSITORY.fullmatch(text):
        return ModelRef(text, home.models / text.replace("/", "--", 1), text)
    known = ", ".join(sorted(BUILTIN_MODELS))
    msg = f"no model {text!r}: give an id ({known}), a folder, or a Hugging Face repository like mlx-community/NAME"
    raise UnknownModelError(msg)


def _real_name(folder: Path) -> str:
    """Return the folder's own name, not that of a link or of ".."."""
    try:
        return Path(os.path.realpath(folder)).name
    except OSError:
        return folder.name


def _is_unicode(text: str) -> bool:
    """Return whether the text can be sent: an argument that is not UTF-8 arrives with surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def fetch(ref: ModelRef, home: Home) -> bool:
    """Fetch the model's folder if it is not there yet; progress goes to stderr. Return whether it is there now."""
    if ref.fetch is None:
        return True
    return run_tool(["fetch", ref.fetch, "--models-dir", str(home.models)], home)


def run_tool(arguments: list[str], home: Home) -> bool:
    """Run the worker side's tools in a process of its own: only that side may import MLX, and it may crash."""
    preload = current_platform().preload(home.run / "lib")
    command = [sys.executable, "-P", "-m", "worker.tools", *arguments]
    completed = subprocess.run(
        command, env=worker_environment(os.environ, preload), stdout=subprocess.DEVNULL, check=False
    )
    return completed.returncode == 0
