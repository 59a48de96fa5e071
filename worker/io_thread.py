"""The IO thread of a worker: it owns both sockets, answers while MLX is busy, and decides when the process ends.

One turn: wait for anything, then tokens of the engine, frames of gateways, frames of the supervisor, timers. It never
waits for the engine: a heartbeat that stops means that this thread is gone, and only that.
"""

import faulthandler
import os
import signal
import threading
from queue import Queue
from time import monotonic
from typing import Final

from protocol.control import Drain, Drained, Dying, Ping, Relieve, Stop, ToWorker, Welcome
from protocol.errors import LmxError, from_peer
from protocol.logs import event
from protocol.spec import WorkerSpec
from protocol.standstill import Standstill
from protocol.states import Phase, WorkerExit
from protocol.tracing import make_tracer
from worker import jobs as engine
from worker.control import ControlClient
from worker.entry import Limits
from worker.inbound import Inbound
from worker.intake import Intake
from worker.jobs import (
    Answered,
    Command,
    End,
    Event,
    Finished,
    LoadProgress,
    Readied,
    Serving,
    Status,
    Warming,
)
from worker.link import RETRY_S, DataLink
from worker.mailbox import Mailbox
from worker.relief import Relief
from worker.report import Report
from worker.requests import NEVER, Book
from worker.room import Room
from worker.whole import WholeBook

_FLUSH_S: Final = 1.0
#: A supervisor that is busy with a slow disk still gets to read them; one that is gone is not waited for.
_LAST_WORDS_S: Final = 2.0
_BIND_WAIT_S: Final = 10.0
_MAX_WAIT_S: Final = 5.0
_ENDING_SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT})


class IoThread:
    """Start it before anything slow: it says hello. `emit` and `finish` are for the main thread."""

    def __init__(self, spec: WorkerSpec, status: Status, commands: "Queue[Command]") -> None:
        now = monotonic()
        self._spec = spec
        self._commands = commands
        self._status = status
        self._mail = Mailbox(status, spec.models.gather_s)
        self._thread = threading.Thread(target=self._run, name="io", daemon=True)
        self._bound = threading.Event()
        self._bind_error: OSError | None = None
        self._report = Report(spec, status)
        self._link = DataLink(spec.endpoint, spec.incarnation)
        self._inbound = Inbound(self._link, spec.incarnation)
        self._control = ControlClient(spec.control_socket, self._report.introduce, now)
        self._watched: tuple[int | None, bool] = (None, False)
        self._book: Book | None = None
        self._intake: Intake | None = None
        self._lease_s = spec.lifecycle.lease_s
        self._standstill = Standstill(spec.lifecycle.slept_s, now)
        self._lease_over = False
        self._heartbeat_at = now
        #: Whether the supervisor knows that there are requests: one that does not may unload an idle model.
        self._told_busy = False
        self._retry_at = NEVER
        self._drain_by = NEVER
        self._end_by = NEVER
        self._clear_at = now + spec.memory.clear_every_s
        self._relief = Relief()
        # Here, before anybody waits for a heartbeat: the import takes half a second where spans are wanted.
        self._tracer = make_tracer(spec.tracing, "lmx-worker")
        self._exit_code = WorkerExit.ASKED
        self._done = False

    # -- for the main thread ----------------------------------------------------------------------------------

    @property
    def wake_fd(self) -> int:
        """Where the signal module may write signal numbers: this thread then sees them while the main one is busy."""
        return self._mail.wake_fd

    def start(self) -> None:
        """Bind, say hello, and return; raise `OSError` if the endpoint cannot be bound."""
        self._thread.start()
        self._bound.wait(_BIND_WAIT_S)
        if self._bind_error is not None:
            raise self._bind_error

    def emit(self, happened: Event) -> None:
        """Hand over an event; waits for half a millisecond at most."""
        self._mail.put(happened)

    def finish(self, code: WorkerExit, message: str) -> None:
        """Say the last words, flush and close; returns within 4 s."""
        self.emit(Finished(code, message))
        self._thread.join(2 * _FLUSH_S + _LAST_WORDS_S)

    # -- the loop ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._link.bind()
        except OSError as error:
            self._bind_error = error
            return
        finally:
            self._bound.set()
        self._link.watch(self._mail.fileno)
        self._control.dial(monotonic())
        while not self._done:
            self._turn()

    def _turn(self) -> None:
        self._watch_control()
        due = self._next_timer()
        self._standstill.rest_until(due)
        readable, fds = self._link.wait(due - monotonic())
        self._forgive_standstill()
        if self._mail.fileno in fds:
            self._on_wake(monotonic())
        if readable and not self._done:  # the end, which closes the sockets, may have been among the events
            self._inbound.receive()
        if self._control.fileno in fds:
            self._control.flush()
            now = monotonic()
            for message in self._control.receive(now):
                self._on_control(message, now)
        now = self._forgive_standstill()
        if now >= self._mail.due and not self._done:
            self._take_events(now)
        if not self._done:
            self._on_timers(now)

    def _forgive_standstill(self) -> float:
        """Return the time. If this machine stood still, so did the supervisor: its lease begins anew."""
        now = monotonic()
        if self._standstill.look(now):
            self._control.heard_at = now
        return now

    def _watch_control(self) -> None:
        """Poll the control connection of now, which may not be the one of the last turn."""
        wanted = (self._control.fileno, self._control.wants_write)
        if wanted == self._watched:
            return
        old, new = self._watched[0], wanted[0]
        if old is not None and old != new:
            self._link.unwatch(old)
        if new is not None:
            self._link.watch(new, write=wanted[1])
        self._watched = wanted

    def _next_timer(self) -> float:
        control = self._control
        return min(
            monotonic() + _MAX_WAIT_S,
            self._heartbeat_at,
            self._mail.due,
            self._retry_at,
            self._drain_by if not self._report.drained else NEVER,
            self._end_by,
            self._clear_at,
            self._relief.due,
            NEVER if self._lease_over else control.heard_at + self._lease_s,
            NEVER if control.connected else control.dial_at,
            NEVER if self._book is None else self._book.next_expiry,
        )

    def _on_timers(self, now: float) -> None:
        control, book = self._control, self._book
        if not control.connected and now >= control.dial_at:
            control.dial(now)
        if now >= self._heartbeat_at or (not self._told_busy and _busy(book)):
            self._heartbeat_at = now + self._spec.lifecycle.heartbeat_s
            self._heartbeat()
        if book is not None and now >= book.next_expiry:
            book.expire(now)
        if not self._lease_over and now >= control.heard_at + self._lease_s:
            self._lease_over = True
            event("lease_expired", level="WARNING", lease_s=self._lease_s)
            self._drain(self._spec.lifecycle.drain_s, now)
        if now >= self._retry_at:
            self._link.retry()
        self._settle_link(now)
        if self._report.draining and not self._report.drained:
            self._settle_drain(now)
        if now >= self._clear_at:
            self._clear_at = now + self._spec.memory.clear_every_s
            if book is not None:
                self._commands.put(engine.Relieve(self._spec.memory.clear_above_bytes))
        if now >= self._relief.due:
            self._relief.expire(now, book)
        if now >= self._end_by:
            self._give_up()

    def _settle_link(self, now: float) -> None:
        """Take the consequences of what sending found out: gateways that are gone, answers nobody reads."""
        link, book = self._link, self._book
        gone, slow = link.take_losses()
        if book is not None:
            for gateway in gone:
                book.forget_gateway(gateway, now)
                if self._intake is not None:
                    self._intake.forget_gateway(gateway)
            for gateway, rid in slow:
                book.fail_slow(gateway, rid, now)
        self._retry_at = now + RETRY_S if link.blocked else NEVER

    def _settle_drain(self, now: float) -> None:
        book = self._book
        if book is not None and now >= self._drain_by:
            book.fail_all(_going_away(), now, retryable=True)
        preparing = self._intake.pending if self._intake is not None else 0
        if book is None or not (book.running or book.waiting or preparing):
            self._report.drained = True
            event("drained")
            self._control.send(Drained())
            if self._lease_over:
                self._end(WorkerExit.LEASE_EXPIRED, "no supervisor was heard for the length of the lease", now)

    def _heartbeat(self, phase: Phase | None = None) -> None:
        self._inbound.log_dropped()
        book = self._book
        self._told_busy = _busy(book)
        self._control.send(self._report.heartbeat(book, phase))
        if book is not None:
            self._link.probe(book.gateways, self._status.step)

    # -- events of the main thread ----------------------------------------------------------------------------

    def _on_wake(self, now: float) -> None:
        arrived = self._mail.read_wake_ups()
        self._take_events(now)
        if arrived & _ENDING_SIGNALS and not self._done:
            event("sigterm_received")
            self._end(WorkerExit.ASKED, "signal", now)

    def _take_events(self, now: float) -> None:
        for happened in self._mail.take():
            if not isinstance(happened, list):
                self._on_event(happened, now)
            elif self._book is not None:
                self._book.on_steps(happened, now)

    def _on_event(self, happened: Event, now: float) -> None:
        match happened:
            case Answered():
                if isinstance(self._book, WholeBook):
                    self._book.on_answers(happened, now)
            case LoadProgress():
                self._control.send(self._report.on_progress(happened))
            case Warming():
                # It may be over by now: a supervisor that never heard of it takes a canary that fails for a bad load.
                self._heartbeat(Phase.WARMING)
            case Serving():
                self._on_serving(happened, now)
            case Readied():
                if self._book is not None and self._intake is not None:
                    self._intake.readied(self._book, happened.unready, now)
            case Finished():
                self._on_finished(happened, now)

    def _on_serving(self, serving: Serving, now: float) -> None:
        models, loaded = self._spec.models, serving.loaded
        limits = Limits(models.max_concurrent_requests, models.queue_depth, models.slot_timeout_s)
        intake = self._intake = self._inbound.intake = Intake(loaded.prepare, loaded.pace, self.emit, loaded.vocabulary)
        kind = WholeBook if loaded.answers_whole else Book
        book = kind(
            limits,
            self._spec.incarnation,
            intake.prepare,
            loaded.vocabulary,
            tokenize=intake.tokenize,
            send=self._link.send,
            command=self._commands.put,
            room=Room(loaded.cache, self._spec.memory.kv_bytes),
            tracer=self._tracer,
        )
        self._book = self._inbound.book = book
        self._relief.apply(book, now)
        if self._report.draining:
            book.close_admission(_going_away(), now)
        memory = self._spec.memory
        every, above = memory.clear_every_s, memory.clear_above_bytes
        event("metal_cache_maintenance_enabled", every_s=every, above_bytes=above)
        event("worker_ready", load_s=round(serving.load_s, 3), weight_bytes=loaded.capabilities.weight_bytes)
        self._control.send(self._report.on_serving(serving))
        self._heartbeat()

    def _on_finished(self, finished: Finished, now: float) -> None:
        if finished.code is not WorkerExit.ASKED:
            self._control.send(Dying(finished.code, finished.message))
        if self._book is not None:
            crashed = LmxError("worker_crashed", "The model's process ended before the answer did")
            self._book.fail_all(crashed, now, retryable=True)
        self._close()

    # -- the supervisor ---------------------------------------------------------------------------------------

    def _on_control(self, message: ToWorker, now: float) -> None:
        match message:
            case Welcome():
                if message.lease_s > 0:
                    self._lease_s = message.lease_s
            case Drain():
                self._drain(message.grace_s, now)
            case Stop():
                self._end(WorkerExit.ASKED, message.reason, now, _told(message))
            case Relieve():
                self._relief.ask(message, now, self._book)
                if message.clear:
                    self._commands.put(engine.Relieve(caches=True))
            case Ping():
                pass  # hearing it was the point

    # -- ending -----------------------------------------------------------------------------------------------

    def _drain(self, grace_s: float, now: float) -> None:
        event("draining", grace_s=grace_s)
        self._report.draining = True
        self._drain_by = now + max(0.0, grace_s)
        if self._book is not None:
            self._book.close_admission(_going_away(), now)

    def _end(self, code: WorkerExit, why: str, now: float, error: LmxError | None = None) -> None:
        """End the process: through the main thread once it serves, at once while it only loads."""
        if self._end_by != NEVER:
            return
        event("worker_ending", code=int(code), why=why)
        self._exit_code = code
        self._end_by = now + self._spec.lifecycle.stop_max_s
        if self._book is None:
            self._close()
            os._exit(code)
        self._book.close_admission(_going_away(), now)
        self._book.fail_all(error or _going_away(), now, retryable=True)
        self._commands.put(End(code, why))

    def _give_up(self) -> None:
        """Leave without the main thread: it has been inside MLX since it was asked to end."""
        event("engine_stuck", level="ERROR", phase=self._status.phase)
        faulthandler.dump_traceback(all_threads=True)
        self._close()
        os._exit(self._exit_code or WorkerExit.STALLED)

    def _close(self) -> None:
        self._link.close(_FLUSH_S)
        self._control.finish(_LAST_WORDS_S)
        self._tracer.close()
        self._done = True


def _busy(book: Book | None) -> bool:
    return book is not None and bool(book.running or book.waiting)


def _told(message: Stop) -> LmxError | None:
    """Return the error that the supervisor wants requests to end with."""
    return from_peer(message.code, f"The model's process was ended: {message.reason}") if message.code else None


def _going_away() -> LmxError:
    return LmxError("model_restarting", "The model's process is ending")
