"""Which versions of MLX a worker runs on; looked up before they are imported."""

import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Final

from protocol.states import WorkerExit
from worker.failures import FatalError

#: Package -> the oldest version that will do, and why no older one does.
_OLDEST: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "mlx": ("0.32.1", "older ones read files out of bounds (CVE-2026-5843)"),
        "mlx-lm": ("0.32", "older ones batch in another way"),
    }
)
_UPGRADE: Final = "make setup installs the versions that LMX is tested with"


def check_versions(installed: Callable[[str], str] = version) -> None:
    """Raise `FatalError` with words for the operator if MLX or mlx-lm is missing or not to be used."""
    for package, (oldest, why) in _OLDEST.items():
        try:
            found = installed(package)
        except PackageNotFoundError:
            raise FatalError(WorkerExit.BAD_CONFIG, f"{package} is not installed: {_UPGRADE}") from None
        if _numbers(found) < _numbers(oldest):
            message = f"{package.upper()} {found} is not used, LMX wants {oldest} or later: {why}. {_UPGRADE}"
            raise FatalError(WorkerExit.BAD_CONFIG, message)


def _numbers(text: str) -> tuple[int, ...]:
    """Return the release of a version: "0.32.1.dev3+g1" is (0, 32, 1)."""
    release = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(number) for number in release[0].split(".")) if release is not None else ()
