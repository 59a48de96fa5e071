"""What an ended process means: one row per exit code, words for the operator, and whether it counts and repeats."""

import signal
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import msgspec

from protocol.states import WorkerExit


class ExitClass(msgspec.Struct, frozen=True):
    """A kind of end. `counted`: adds to the crash loop. `permanent`: trying again cannot help."""

    name: str
    words: str
    counted: bool = True
    permanent: bool = False


class ExitRecord(msgspec.Struct, frozen=True):
    """How one process ended. `code` or `signal` is set, neither if the process was not our child."""

    name: str
    reason: str
    at: float
    code: int | None = None
    signal: str | None = None
    counted: bool = True
    permanent: bool = False
    hint: str = ""
    degrade: bool = False
    extra_delay_s: float = 0.0
    probe: bool = True


ASKED: Final = ExitClass("asked", "stopped because it was asked to", counted=False)
HANG: Final = ExitClass("hang", "made no progress within its deadline and was ended")
LOST: Final = ExitClass("lost", "ended; its exit status went to another parent")

_BY_CODE: Final[Mapping[int, ExitClass]] = MappingProxyType(
    {
        WorkerExit.ASKED: ExitClass("ended", "ended by itself without being asked"),
        WorkerExit.USAGE: ExitClass("usage", "was started wrongly", permanent=True),
        WorkerExit.CORRUPT_MODEL: ExitClass("load_error", "the model's files are damaged", permanent=True),
        WorkerExit.MISSING_MODEL: ExitClass("load_error", "the model's files are missing", permanent=True),
        WorkerExit.NO_DEVICE: ExitClass("no_device", "found no usable GPU"),
        WorkerExit.BUG: ExitClass("python_error", "an unexpected Python error ended it"),
        WorkerExit.REMOTE_CODE_REFUSED: ExitClass(
            "load_error", "the model needs code of its own, which is refused", permanent=True
        ),
        WorkerExit.BAD_CONFIG: ExitClass("bad_config", "its configuration cannot be used", permanent=True),
        WorkerExit.GPU_POISONED: ExitClass("gpu_poisoned", "the GPU refused further work of this process"),
        WorkerExit.METAL_OUT_OF_MEMORY: ExitClass("metal_oom", "Metal ran out of memory"),
        WorkerExit.RESOURCE_LIMIT: ExitClass("resource_limit", "a resource limit of Metal was reached"),
        WorkerExit.STALLED: ExitClass("stall", "found itself without progress"),
        WorkerExit.LEASE_EXPIRED: ExitClass("lease", "saw no supervisor for the lease and ended", counted=False),
    }
)
_KILLED: Final = ExitClass("killed", "was killed from outside (SIGKILL), by a person or by the system for memory")
_NATIVE: Final = ExitClass("native_crash", "native code crashed")
_TERMINATED: Final = ExitClass("terminated", "was ended from outside")
_PYTHON: Final = ExitClass("python_error", "ended with an exit code that is not one of ours")

_NATIVE_SIGNALS: Final = frozenset(
    {signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP, signal.SIGSYS}
)


def classify(returncode: int | None, *, at: float, asked: bool, hung: bool, last_words: str = "") -> ExitRecord:
    """Return what the end of a process means.

    `returncode` is `Popen.returncode` (negative: a signal), None if unknown. `asked` says that we told it to stop,
    `hung` that we ended it for lack of progress. `last_words` is what the worker itself gave as the reason.
    """
    kind = _kind(returncode, asked=asked, hung=hung)
    by_signal = _signal_name(-returncode) if returncode is not None and returncode < 0 else None
    detail = by_signal or (f"exit code {returncode}" if returncode is not None else "")
    reason = kind.words if not last_words else f"{kind.words}: {last_words}"
    return ExitRecord(
        name=kind.name,
        reason=f"{reason} ({detail})" if detail and kind is not ASKED else reason,
        at=at,
        code=returncode if returncode is not None and returncode >= 0 else None,
        signal=by_signal,
        counted=kind.counted,
        permanent=kind.permanent,
    )


def _kind(returncode: int | None, *, asked: bool, hung: bool) -> ExitClass:
    if hung:
        return HANG
    if asked:
        return ASKED
    if returncode is None:
        return LOST
    if returncode >= 0:
        return _BY_CODE.get(returncode, _PYTHON)
    number = -returncode
    if number == signal.SIGKILL:
        return _KILLED
    return _NATIVE if number in _NATIVE_SIGNALS else _TERMINATED


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
