"""The life of a worker process, from its spec to its exit code. Shared with the fault worker of the tests."""

import faulthandler
import gc
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from time import monotonic
from typing import Final, NoReturn

import msgspec
from loguru import logger

from protocol.logs import event, exception_event, setup_logging
from protocol.spec import WorkerSpec, read_spec
from protocol.states import Phase, WorkerExit
from worker.engine import Engine
from worker.failures import FatalError, classify, describe
from worker.io_thread import IoThread
from worker.jobs import Answered, Command, Loaded, LoadProgress, Scores, Serving, Status, Stepped, Warming, Whole

Load = Callable[[WorkerSpec, Callable[[int, int, str], None]], Loaded]

_REPORT_EVERY_S: Final = 0.1
#: The engine thread holds the interpreter while it builds a graph; the IO thread should get in between sooner than
#: after the default 5 ms, which is longer than a step of a small model.
_SWITCH_INTERVAL_S: Final = 0.001


def main(argv: list[str], load: Load, io_class: type[IoThread] = IoThread) -> NoReturn:
    """Run the worker that `argv` names (one argument, a spec file) and exit."""
    dump_stacks_when_asked()
    if len(argv) != 2:
        sys.stderr.write("usage: python -m worker SPEC.json\n")
        sys.exit(WorkerExit.USAGE)
    try:
        spec = read_spec(Path(argv[1]), WorkerSpec)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        sys.stderr.write(f"{argv[1]}: not a usable spec: {error}\n")
        sys.exit(WorkerExit.BAD_CONFIG)
    setup_logging(f"worker:{spec.slot}", file=Path(spec.log_file), terminal=False, level=spec.log_level)
    run(spec, load, io_class)


def run(spec: WorkerSpec, load: Load, io_class: type[IoThread]) -> NoReturn:
    """Say hello, load, serve, exit."""
    event("worker_starting", model=spec.model, incarnation=spec.incarnation, path=spec.path)
    status = Status()
    # No SimpleQueue: in CPython 3.11 a signal during its wait with a timeout can make that wait endless.
    commands: Queue[Command] = Queue()
    io = io_class(spec, status, commands)
    _arrange_process(io.wake_fd)
    _log_blas(spec.preloaded)
    try:
        io.start()
    except OSError as error:
        event("bind_failed", level="ERROR", endpoint=spec.endpoint, why=error.strerror)
        leave(WorkerExit.BAD_CONFIG)
    code, message = _serve(spec, load, io, status, commands)
    if code is not WorkerExit.ASKED:
        event("worker_dying", level="ERROR", code=int(code), why=message)
    io.finish(code, message)
    leave(code)


def leave(code: int) -> NoReturn:
    """End the process now. Not `sys.exit`: taking MLX apart at interpreter exit can hang or crash."""
    event("worker_exit", code=int(code))
    logger.remove()
    sys.stderr.flush()
    os._exit(code)


def _serve(
    spec: WorkerSpec, load: Load, io: IoThread, status: Status, commands: "Queue[Command]"
) -> tuple[WorkerExit, str]:
    """Return the exit code and the last words. Whatever is raised here ends the process."""
    doing = "loading"
    started = monotonic()
    loaded: Loaded | None = None
    try:
        loaded = load(spec, _Reporter(io).report)
        doing = "warming"
        status.step_at = monotonic()
        status.phase = Phase.WARMING
        io.emit(Warming())
        loaded.canary()
        capabilities = msgspec.structs.replace(loaded.capabilities, step_s=loaded.time_step())
        loaded = msgspec.structs.replace(loaded, capabilities=capabilities)
        # What is there now stays for good: collections need not look at it again.
        gc.collect()
        gc.freeze()
        doing = "serving"
        status.phase = Phase.IDLE
        io.emit(Serving(loaded, monotonic() - started))
        end = Engine(
            loaded.backend,
            commands,
            io.emit,
            status,
            reports=_report_answers if loaded.answers_whole else Stepped,
            canary=loaded.canary,
            canary_idle_s=spec.lifecycle.canary_idle_s,
            relieve=loaded.relieve,
        ).run()
        loaded.close()
    except FatalError as error:
        _abandon(loaded)
        return error.code, error.message
    except Exception as error:  # noqa: BLE001 - the boundary of the main thread: log, tell, end
        exception_event("engine_failed", error, doing=doing)
        _abandon(loaded)
        return classify(error), f"{doing} failed: {describe(error)}"
    return end.code, end.message


def _abandon(loaded: Loaded | None) -> None:
    if loaded is None:
        return
    try:
        loaded.abandon()
    except Exception as error:  # noqa: BLE001 - the exit code of the failure matters more
        exception_event("engine_failed", error, doing="ending")


def _report_answers(step: int, answers: list[Whole], _scores: Scores) -> Answered:
    """Whole answers have no tokens to score."""
    return Answered(step, answers)


class _Reporter:
    """Passes on at most ten reports a second, and every last one of a stage."""

    def __init__(self, io: IoThread) -> None:
        self._io = io
        self._at = 0.0

    def report(self, done: int, total: int, stage: str) -> None:
        now = monotonic()
        if now - self._at >= _REPORT_EVERY_S or done in {0, total}:
            self._at = now
            self._io.emit(LoadProgress(done, total, stage))


def dump_stacks_when_asked() -> None:
    """Write the stacks of all threads to stderr when dying of a signal, and on SIGUSR1: a supervisor's last wish."""
    faulthandler.enable(all_threads=True)
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)


def _arrange_process(wake_fd: int) -> None:
    threading.excepthook = _die_of_thread
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    # The IO thread acts on these: it is there also while the main thread is inside MLX for a minute.
    signal.set_wakeup_fd(wake_fd, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # The C++ compiler that mx.compile starts must not get our matrix library.
    os.environ.pop("LD_PRELOAD", None)
    # Under suspicion of hanging the GPU by several reports.
    os.environ.pop("MLX_METAL_FAST_SYNCH", None)
    # A model is a folder: nothing here may ask a network for anything.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _die_of_thread(args: threading.ExceptHookArgs) -> None:
    """A worker without its IO thread answers nobody."""
    # What the supervisor's crash table looks for. Without the exception's message, which may quote a prompt.
    sys.stderr.write(f"Exception in thread {args.thread.name if args.thread else ''}:\n")
    if args.exc_value is not None:
        exception_event("thread_died", args.exc_value, thread=args.thread.name if args.thread else "")
    leave(WorkerExit.BUG)


def _log_blas(preloaded: str) -> None:
    """Say whether the matrix library that makes the CPU usable is really in this process."""
    maps = Path("/proc/self/maps")
    if not maps.exists():  # macOS: the GPU does the work
        return
    wanted = Path(preloaded).name if preloaded else "libopenblas"
    paths = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if wanted in line}
    if paths:
        event("blas_preloaded", path=min(paths))
    else:
        event("blas_not_preloaded", level="WARNING", wanted=preloaded)
