"""A worker starts only on versions of MLX that will do, and says which and why."""

from importlib.metadata import PackageNotFoundError

import pytest

from protocol.states import WorkerExit
from worker.failures import FatalError
from worker.versions import check_versions


def test_the_versions_that_are_installed_here_will_do() -> None:
    check_versions()


@pytest.mark.parametrize("mlx", ["0.32.1", "0.33", "1.0.0.dev20261101+abc", "0.32.10"])
def test_later_versions_will_do(mlx: str) -> None:
    check_versions({"mlx": mlx, "mlx-lm": "0.32.2"}.__getitem__)


@pytest.mark.parametrize(
    ("mlx", "mlx_lm", "words"),
    [
        ("0.31.2", "0.32.2", "MLX 0.31.2 is not used, LMX wants 0.32.1 or later: older ones read files out of bounds"),
        ("0.32.0", "0.32.2", "MLX 0.32.0 is not used"),
        ("0.32.1", "0.31.3", "MLX-LM 0.31.3 is not used"),
        ("unknown", "0.32.2", "MLX unknown is not used"),
    ],
)
def test_an_older_version_is_refused_with_the_reason(mlx: str, mlx_lm: str, words: str) -> None:
    with pytest.raises(FatalError) as caught:
        check_versions({"mlx": mlx, "mlx-lm": mlx_lm}.__getitem__)
    assert caught.value.code is WorkerExit.BAD_CONFIG
    assert words in caught.value.message
    assert "make setup" in caught.value.message


def test_a_missing_package_is_named() -> None:
    def installed(package: str) -> str:
        raise PackageNotFoundError(package)

    with pytest.raises(FatalError, match="mlx is not installed"):
        check_versions(installed)
