"""OpenBLAS for workers on Linux, where the mlx wheel carries a reference BLAS that is 40 times slower.

The `cmeel-openblas` wheel is built for one processor family and wants a `libgfortran.so.5` that a bare machine lacks;
the mlx wheel ships one under another name. So each way of loading it is tried in a process of its own first: a
library that cannot be used costs speed, never a worker.
"""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

_OPENBLAS: Final = "cmeel.prefix/lib/libopenblas.so"
_FORTRAN: Final = "mlx_cpu.libs/libgfortran-*.so.5*"
_PROBE_S: Final = 30.0
#: Large enough to reach the threaded kernels, where an unknown instruction shows.
_PROBE: Final = """
import ctypes
n = 192
row, plain, f = 101, 111, ctypes.c_float
a, b, c = ((f * (n * n))(*([x] * (n * n))) for x in (1.0, 2.0, 0.0))
ctypes.CDLL(None).cblas_sgemm(row, plain, plain, n, n, n, f(1.0), a, n, b, n, f(0.0), c, n)
raise SystemExit(0 if c[0] == c[n * n - 1] == 2.0 * n else 1)
"""


class Preload(msgspec.Struct, frozen=True):
    """A matrix library that works here: its path, and the environment that makes the loader take it."""

    library: str
    environment: dict[str, str]


def find_blas(links: Path) -> Preload | None:
    """Return OpenBLAS if it is installed and computes on this machine. `links` is a folder for a link it may need."""
    packages = Path(sysconfig.get_paths()["purelib"])
    library = packages / _OPENBLAS
    if not library.is_file():
        return None
    for environment in _ways(library, packages, links):
        if _computes(environment):
            return Preload(str(library), environment)
    return None


def _ways(library: Path, packages: Path, links: Path) -> Iterator[dict[str, str]]:
    yield {"LD_PRELOAD": str(library)}
    for fortran in packages.glob(_FORTRAN):
        # Preloaded under its own name it finds its neighbours; the link gives the same file the name OpenBLAS wants.
        link = links / "libgfortran.so.5"
        try:
            links.mkdir(mode=0o700, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(fortran)
        except OSError:
            return
        yield {"LD_PRELOAD": f"{fortran}:{library}", "LD_LIBRARY_PATH": str(links)}


def _computes(environment: dict[str, str]) -> bool:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROBE],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_PROBE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
