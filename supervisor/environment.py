"""The environment of processes that compute: the preloaded matrix library, and nothing that unsettles Metal."""

from collections.abc import Mapping

from supervisor.platform.blas import Preload


def worker_environment(environ: Mapping[str, str], preload: Preload | None, blas_threads: int = 0) -> dict[str, str]:
    """Return `environ` for a worker; `blas_threads` 0 leaves the number of threads to the library."""
    result = dict(environ)
    result.pop("MLX_METAL_FAST_SYNCH", None)  # hangs reported with it
    if preload is not None:
        result.update(preload.environment)
    if blas_threads:
        result["OPENBLAS_NUM_THREADS"] = str(blas_threads)
    return result
