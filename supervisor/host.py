"""Owns every slot: feeds events into the pure lifecycle and carries its actions out on real processes."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from protocol import control
from protocol.config import Config
from protocol.paths import Home
from protocol.states import ModelState, Phase
from supervisor import events as ev
from supervisor import lifecycle as life
from supervisor import reclaim
from supervisor.blackbox import BlackBox
from supervisor.breaker import Breaker, after_failure, after_start, start_allowed_at
from supervisor.children import Child, start_failure
from supervisor.clock import Clock
from supervisor.crash_reports import CrashReports
from supervisor.crashes import crash_id
from supervisor.exits import ExitRecord, record
from supervisor.footprint import Meter
from supervisor.guard import Guard
from supervisor.journal import Journal
from supervisor.launch import SPARE, Launcher
from supervisor.managed import Managed
from supervisor.platform.base import Platform
from supervisor.recovery import Recovery
from supervisor.restarts import RestartPolicy
from supervisor.slot import Settings, Slot
from supervisor.spare import Spare
from supervisor.transitions import write_down

GATEWAY: Final = "gateway"


class Host:
    """All slots of this machine. `changed` is called after any visible change, `saved` when processes changed."""

    def __init__(
        self, home: Home, config: Config, platform: Platform, journal: Journal, changed: Callable[[], None]
    ) -> None:
        self.home = home
        self.config = config
        self.platform = platform
        self.journal = journal
        self.slots: dict[str, Managed] = {}
        #: Number of the newest process of any slot; never used twice on one home.
        self.incarnation = 0
        #: The listening socket's descriptor, inherited by each gateway; no gateway starts while it is -1.
        self.listen_fd = -1
        #: While True nothing is started: processes of an earlier supervisor may still introduce themselves.
        self.holding = True
        #: Whether all processes are being ended, and no model may be added.
        self.ending = False
        self.guard = Guard()
        self.meter = Meter(platform, self.guard)
        self._changed = changed
        self._clock = Clock(
            self.slots, journal, self.guard, config.lifecycle.slept_s, feed=self.feed, start_due=self._start_due
        )
        self._random = random.Random()  # noqa: S311 - spreads delays
        self.launcher = Launcher(home, config, platform)
        self.breaker = Breaker()
        self.crashes = CrashReports(
            home.crashes, journal, knows=lambda model: self.find(model) is not None, corrected=self._corrected
        )
        self.spare = Spare(self.launcher, platform, journal, config.lifecycle, changed) if config.worker.spare else None
        #: Called before a model's process is started, so that a panic while it loads finds its name on disk.
        self.before_load: Callable[[str], None] = lambda _model: None
        self.recovery = Recovery(journal)
        #: Called when a process has ended, before its end is judged: what it had said and nobody had read counts.
        self.before_end: Callable[[Managed], None] = lambda _managed: None
        #: Asked before a model's process is started, at a monotonic time: whether there is room for it.
        self.gate: Callable[[Managed, float], bool] = lambda _managed, _now: True

    # -- slots ----------------------------------------------------------------------------------------------------

    def add(
        self, name: str, policy: RestartPolicy, *, model: str = "", path: str = "", created_at: float = 0
    ) -> Managed:
        """Make a slot; it stays stopped until it is wanted."""
        config = self.config.lifecycle
        if not model:
            hung = config.gateway_hung_s
            late = min(config.heartbeat_late_s, hung / 2)
            config = msgspec.structs.replace(config, heartbeat_hung_s=hung, heartbeat_late_s=late)
        settings = Settings(config, policy)
        self.slots[name] = Managed(name, settings, model=model, path=path, created_at=created_at)
        return self.slots[name]

    def remove(self, managed: Managed) -> None:
        """Forget a stopped slot."""
        assert managed.child is None, "a slot with a process is not forgotten"
        if self.slots.get(managed.name) is not managed:
            return  # forgotten already, and perhaps another has its name
        del self.slots[managed.name]
        self.crashes.forget(managed.model)
        self._changed()

    def models(self) -> list[Managed]:
        """Return the slots of models, oldest first."""
        return [managed for managed in self.slots.values() if managed.model]

    def find(self, model: str) -> Managed | None:
        """Return the slot of a model id."""
        return next((managed for managed in self.models() if managed.model == model), None)

    # -- events and actions ---------------------------------------------------------------------------------------

    def feed(self, managed: Managed, event: ev.Event) -> None:
        """Let something happen to a slot, and do what follows from it."""
        before = managed.slot
        managed.slot, actions = life.advance(before, event, time.monotonic(), managed.settings)
        write_down(self.journal, self.recovery, managed, before)
        for action in actions:
            self._act(managed, action)
        if managed.slot != before:
            self._changed()
        self._clock.wake_soon()

    def _act(self, managed: Managed, action: ev.Action) -> None:
        slot = managed.slot
        match action:
            case ev.Action.ASK_DRAIN:
                replaced = not managed.model and managed.name != GATEWAY
                if replaced and managed.foreign:
                    self._signal(managed, signal.SIGUSR2)  # it cannot read our messages
                elif not managed.tell(control.Drain(self.config.lifecycle.drain_s, hand_over=replaced)):
                    self.feed(managed, ev.Unwant(force=True) if not slot.wanted else ev.Restart(force=True))
            case ev.Action.ASK_STOP:
                if not managed.tell(control.Stop("asked")):
                    self._signal(managed, signal.SIGTERM)
            case ev.Action.DUMP_STACKS:
                self.journal.write("hung", level="ERROR", model=managed.model, slot=managed.name, reason=slot.condemned)
                self._signal(managed, signal.SIGUSR1)
            case ev.Action.TERMINATE:
                self._signal(managed, signal.SIGTERM)
            case ev.Action.KILL:
                self._signal(managed, signal.SIGKILL)

    def _signal(self, managed: Managed, number: signal.Signals) -> None:
        if managed.child is not None:
            managed.child.signal(number)

    # -- processes ------------------------------------------------------------------------------------------------

    def adopt(self, managed: Managed, pid: int, incarnation: int, phase: Phase) -> bool:
        """Take over a process of an earlier supervisor; return whether it still lives."""
        started = self.platform.process_started(pid)
        if started is None:
            return False
        try:
            managed.child = Child(self.platform, pid, started, lambda code: self._ended(managed, code))
        except ProcessLookupError:
            return False
        managed.box = BlackBox(self.home.logs / f"{managed.name}.out")
        self.incarnation = max(self.incarnation, incarnation)
        self.journal.write("process_adopted", model=managed.model, slot=managed.name, pid=pid, incarnation=incarnation)
        self.feed(managed, ev.Adopted(pid, incarnation, phase))
        return True

    def start(self, managed: Managed) -> None:
        """Spawn the next incarnation of a slot."""
        self.incarnation += 1
        incarnation = self.incarnation
        degraded = bool(managed.model) and managed.slot.next_degraded(self.config.lifecycle)
        managed.last_words = managed.verdict = ""
        managed.box = BlackBox(self.home.logs / f"{managed.name}.out")
        managed.heartbeat = managed.memory_bytes = managed.capabilities = None
        managed.owed, managed.blocked = None, ""
        if managed.model:
            self.before_load(managed.model)
            self.breaker = after_start(self.breaker, time.monotonic())
        try:
            managed.child = self._spawn(managed, incarnation, degraded=degraded)
        except OSError as error:
            failed = record(start_failure(error), at=time.time(), detail=f": {error.strerror}")
            self.feed(managed, ev.SpawnFailed(failed, self._luck()))
            return
        with self.guard("start"):  # a process that runs must be known to run
            self.journal.write(
                "process_started",
                model=managed.model,
                slot=managed.name,
                pid=managed.child.pid,
                incarnation=incarnation,
                degraded=degraded,
            )
        self.feed(managed, ev.Started(managed.child.pid, incarnation, degraded))

    def _spawn(self, managed: Managed, incarnation: int, *, degraded: bool) -> Child:
        def gone(returncode: int | None) -> None:
            self._ended(managed, returncode)

        if not managed.model:
            return self.launcher.gateway(managed.name, incarnation, self.listen_fd, gone)
        managed.endpoint = str(self.home.endpoint(managed.name, incarnation))
        spared = self._take_spare(managed, incarnation, degraded=degraded)
        if spared is not None:
            spared.belongs_to(gone)
            return spared
        return self.launcher.worker(managed.name, incarnation, managed.model, managed.path, gone, degraded=degraded)

    def _take_spare(self, managed: Managed, incarnation: int, *, degraded: bool) -> Child | None:
        """Make the spare, if one is ready, the worker of this slot."""
        spare = self.spare
        if spare is None or not spare.ready:
            return None
        spec = self.launcher.worker_spec(managed.name, incarnation, managed.model, managed.path, degraded=degraded)
        child = spare.take(msgspec.json.encode(spec))
        if child is not None:
            self.home.spec(SPARE, spare.incarnation).unlink(missing_ok=True)
            self.journal.write("spare_used", model=managed.model, pid=child.pid)
        return child

    def _ended(self, managed: Managed, returncode: int | None) -> None:
        seen_at = time.time()
        self.before_end(managed)
        slot = managed.slot
        asked = (slot.state is ModelState.STOPPING and not slot.condemned) or not slot.wanted
        end, tail = record("lost", at=seen_at), ""
        with self.guard("end"):  # whatever fails here, it is gone
            tail = "" if managed.box is None else managed.box.tail()
            end = self.crashes.explain(managed, returncode, tail, at=seen_at, asked=asked)
        crash = "" if end.name == "asked" else crash_id(seen_at, managed.name, slot.incarnation)
        with self.guard("end"):
            self.journal.write(
                "process_exited",
                level="INFO" if asked and not slot.condemned else "ERROR",
                model=managed.model,
                slot=managed.name,
                pid=slot.pid,
                incarnation=slot.incarnation,
                exit_class=end.name,
                code=end.code,
                signal=end.signal,
                reason=end.reason,
                state=slot.state.value,
                seen_at=seen_at,
                crash=crash,
            )
        managed.child = None
        managed.foreign = False
        managed.owed = reclaim.owed(slot.footprint, slot.weight_bytes, time.monotonic()) if managed.model else None
        if managed.model and end.counted and not asked:
            self._count_failure(managed)
        if managed.channel is not None:
            managed.channel.close("its process ended")
            managed.channel = None
        for leftover in (self.home.spec(managed.name, slot.incarnation), Path(managed.endpoint or os.devnull)):
            if leftover.suffix in {".json", ".sock"}:
                with contextlib.suppress(OSError):
                    leftover.unlink()
        report = None
        with self.guard("crash record"):
            report = self.crashes.make(managed, end, tail)
        self.feed(managed, ev.Exited(end, self._luck()))
        if report is not None:  # after what has to be quick
            with self.guard("crash record"):
                self.crashes.write(report, tail)
        if not managed.model and managed.name != GATEWAY:
            self.remove(managed)  # a gateway that was replaced

    def _corrected(self, managed: Managed, was: ExitRecord, better: ExitRecord) -> None:
        if self.slots.get(managed.name) is managed:
            self.feed(managed, ev.Reclassified(was, better))

    def condemn(self, model: str, incarnation: int) -> None:
        """End a worker that a gateway cannot understand."""
        managed = self.find(model)
        if managed is None or managed.slot.incarnation != incarnation:
            return
        if managed.slot.alive and managed.slot.state is not ModelState.STOPPING:
            managed.verdict = "protocol_error"
            self.feed(managed, ev.Condemned("sent unreadable messages to the gateway"))

    def _count_failure(self, managed: Managed) -> None:
        now = time.monotonic()
        was_open = now < self.breaker.open_until
        self.breaker = after_failure(self.breaker, managed.model, now, self.config.lifecycle)
        if now < self.breaker.open_until and not was_open:
            seconds = self.config.lifecycle.breaker_open_s
            self.journal.write("host_breaker_open", level="ERROR", seconds=seconds, failures=len(self.breaker.failures))

    def _luck(self) -> float:
        return self._random.uniform(-1, 1)

    # -- what is started, and when ---------------------------------------------------------------------------------

    def _start_due(self, now: float) -> None:
        if self.holding:
            return
        gateway = self.slots.get(GATEWAY)
        if self.listen_fd >= 0 and gateway is not None and gateway.slot.waiting and gateway.slot.retry_at <= now:
            self.start(gateway)
        models = [managed for managed in self.models() if self._has_room(managed, now)]
        chosen = life.may_start([managed.slot for managed in models], now)
        if chosen is not None and start_allowed_at(self.breaker, now, self.config.lifecycle) <= now:
            self.start(models[chosen])
        busy = any(managed.slot.coming_up or managed.slot.waiting for managed in self.models())
        if self.spare is not None and not busy and self.spare.start(self.incarnation + 1, now):
            self.incarnation += 1

    def _has_room(self, managed: Managed, now: float) -> bool:
        """Return False for a model whose next process must wait for memory."""
        if not managed.slot.waiting or managed.slot.retry_at > now:
            return True
        return self._has_its_memory_back(managed, now) and self.gate(managed, now)

    def _has_its_memory_back(self, managed: Managed, now: float) -> bool:
        debt = managed.owed
        if debt is None:
            return True
        available = self.meter.available()
        verdict = reclaim.judge(debt, available, now, self.config.lifecycle.reclaim_s)
        if verdict is reclaim.Verdict.BLOCK and available is not None:
            if not managed.blocked:
                self.journal.write(
                    "memory_not_reclaimed",
                    level="ERROR",
                    model=managed.model,
                    needed_bytes=debt.needed,
                    available_bytes=available,
                )
            managed.blocked = reclaim.words(debt, available, now)
        return verdict is reclaim.Verdict.START

    def replace_gateway(self) -> None:
        """Start another gateway on the same listening socket, and let the present one finish what it has."""
        old = self.slots.pop(GATEWAY)
        self.add(GATEWAY, old.settings.policy).slot = msgspec.structs.replace(
            Slot(), wanted=True, state=ModelState.STARTING, incarnation=old.slot.incarnation, restarts=old.slot.restarts
        )
        old.name = f"{GATEWAY}.{old.slot.incarnation}"
        self.slots[old.name] = old
        self.feed(old, ev.Unwant())

    def relieve_gateway(self, managed: Managed) -> None:
        """Replace a gateway that somebody else has told to end, before its last request has: it refuses new ones."""
        if managed is self.slots.get(GATEWAY) and managed.slot.state is ModelState.READY and managed.slot.wanted:
            self.journal.write("gateway_relieved", level="WARNING", pid=managed.slot.pid)
            self.replace_gateway()

    def release(self) -> None:
        """Start to start: everything that could be adopted has been."""
        self.holding = False
        self.wake()

    def wake(self) -> None:
        """Look again at what is due."""
        self._clock.wake_soon()

    def close(self) -> None:
        """Stop the clock; living processes are left alone."""
        self.crashes.close()
        self._clock.close()
        for managed in self.slots.values():
            if managed.child is not None:
                managed.child.forget()
