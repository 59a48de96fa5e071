"""Which exit code an exception means: one table, read from top to bottom."""

import errno
from typing import Final

from protocol.states import WorkerExit


class FatalError(Exception):
    """The process has to end, and knows why: `code` is the exit code, `message` is for the operator."""

    def __init__(self, code: WorkerExit, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


#: Parts of MLX's own texts (lower case). The first that occurs decides.
_BY_TEXT: Final = (
    ("insufficient memory", WorkerExit.METAL_OUT_OF_MEMORY),
    ("outofmemory", WorkerExit.METAL_OUT_OF_MEMORY),
    ("maximum allowed buffer size", WorkerExit.RESOURCE_LIMIT),
    ("resource limit", WorkerExit.RESOURCE_LIMIT),
    ("unable to allocate", WorkerExit.RESOURCE_LIMIT),
    ("no metal device", WorkerExit.NO_DEVICE),
    ("[metal]", WorkerExit.GPU_POISONED),
)
_MAX_TEXT: Final = 300


def classify(error: BaseException) -> WorkerExit:
    """Return the exit code for what MLX raised; 70 for everything that is not known to be the machine's fault."""
    if isinstance(error, MemoryError) or _out_of_descriptors(error):
        return WorkerExit.RESOURCE_LIMIT
    text = str(error).lower()
    return next((code for part, code in _BY_TEXT if part in text), WorkerExit.BUG)


def describe(error: BaseException) -> str:
    """Return words for the operator. The text of an exception is quoted only where MLX wrote it ("[where] what")."""
    text = str(error)
    if isinstance(error, OSError) and _out_of_descriptors(error):
        return f"{type(error).__name__}: {error.strerror}"
    quoted = f": {text[:_MAX_TEXT]}" if text.startswith("[") and isinstance(error, RuntimeError) else ""
    return f"{type(error).__name__}{quoted}"


def _out_of_descriptors(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}
