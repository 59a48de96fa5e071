"""Watches memory four times a second, and does what the policy says: eases, replaces, ends, unloads, sheds."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

from protocol import control
from protocol.states import ModelState, Phase
from supervisor import concurrency, enforcement, ledger
from supervisor import events as ev
from supervisor.admission import Admission
from supervisor.concurrency import Concurrency
from supervisor.enforcement import Order, Whole
from supervisor.host import GATEWAY, Host
from supervisor.managed import Managed
from supervisor.pace import SLOW, PaceKeeper
from supervisor.platform.base import Pressure
from supervisor.prediction import UNREADABLE, History, key_of

#: The lifecycle hears of a footprint this often, or when it changed by this share.
_WEIGH_S: Final = 1.0
_NEWS: Final = 0.01
#: A process has settled when it has been ready for so long and nobody uses it.
_SETTLE_S: Final = 2.0
#: A worker that should take no requests is told so this often, and keeps to it for so long.
_TELL_S: Final = 1.0
_CLOSE_S: Final = 5.0
#: So long has a process that is ended for its memory to tell its requests why and to leave by itself, which takes it
#: some milliseconds unless it is held up. Then it is killed.
_LAST_WORDS_S: Final = 1.5
#: One that is drained may still grow.
_WATCHED: Final = frozenset({ModelState.LOADING, ModelState.WARMING, ModelState.READY, ModelState.DRAINING})
#: The gateway is replaced after so many samples above its limit, and at most so often.
_SAMPLES: Final = 2
_REPLACE_S: Final = 60.0
#: Caches are asked to give way this often while the machine is nearly short of memory.
_EASE_S: Final = 10.0
_BUSY: Final = frozenset({Phase.PREFILL, Phase.DECODE})


class Warden:
    """`changed` is called when what clients or operators see has changed."""

    def __init__(self, host: Host, admission: Admission, history: History, changed: Callable[[], None]) -> None:
        self._host = host
        self._admission = admission
        self._history = history
        self._changed = changed
        self._config = host.config.memory
        self._pace = PaceKeeper(host.journal, history, host.config.worker.module)
        self._whole = Whole()
        self._concurrency = Concurrency()
        self._machine = host.meter.machine()
        self._pressure: Pressure | None = host.meter.pressure()
        self._weighed_at: dict[str, float] = {}
        self._gateway_grown = 0
        self._gateway_replaced_at = self._eased_at = float("-inf")
        admission.closed = self._closed

    @property
    def shedding(self) -> bool:
        """Whether the machine is so short of memory that no inference should begin."""
        return self._whole.shedding

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            with self._host.guard("memory"):
                await self.look()
            await asyncio.sleep(self._config.sample_s)

    async def look(self) -> None:
        """Take one sample of everything, and act on it."""
        now = time.monotonic()
        for managed in list(self._host.slots.values()):
            with self._host.guard("sample"):
                self._weigh(managed, now)
                if managed.model and managed.slot.alive and not self._host.holding:
                    self._watch(managed, now)
        with self._host.guard("gateway"):
            self._look_at_gateway(now)
        with self._host.guard("pressure"):
            self._look_at_machine(now)
        if self._host.holding:
            return
        for model in ledger.expired(self._admission.uses(), now):
            stale = self._host.find(model)
            if stale is not None:
                self._admission.unload(stale, "nobody used it for as long as it may stay")
        for managed in self._host.models():
            if managed.slot.pid and managed.account.prediction is None:
                await self._admission.fill_in(managed)

    # -- the gateway ----------------------------------------------------------------------------------------------

    def _look_at_gateway(self, now: float) -> None:
        """Replace a gateway that has grown: the next one takes the connections, it ends what it has."""
        gateway, limit = self._host.slots.get(GATEWAY), self._config.gateway_limit_bytes
        found = None if gateway is None or gateway.slot.state is not ModelState.READY else gateway.memory_bytes
        if gateway is None or not limit or found is None or found <= limit:
            self._gateway_grown = 0
            return
        self._gateway_grown += 1
        if self._gateway_grown < _SAMPLES or now - self._gateway_replaced_at < _REPLACE_S:
            return
        self._gateway_grown, self._gateway_replaced_at = 0, now
        self._host.journal.write("gateway_grown", level="WARNING", pid=gateway.slot.pid, memory_bytes=found)
        self._host.replace_gateway()
        self._host.wake()
        self._changed()

    # -- one process ----------------------------------------------------------------------------------------------

    def _weigh(self, managed: Managed, now: float) -> None:
        pid = managed.slot.pid
        found = self._host.meter.process(pid) if pid else None
        before, managed.memory_bytes = managed.slot.footprint, found
        due = now - self._weighed_at.get(managed.name, 0.0) >= _WEIGH_S
        if pid and due:
            self._weighed_at = {name: at for name, at in self._weighed_at.items() if name in self._host.slots}
            self._weighed_at[managed.name] = now
            if managed.box is not None:
                managed.box.weigh(now, found)
        if found is not None and found != before and (due or abs(found - before) > before * _NEWS):
            self._host.feed(managed, ev.Weighed(found))

    def _watch(self, managed: Managed, now: float) -> None:
        account, slot, found = managed.account, managed.slot, managed.memory_bytes
        if account.incarnation != slot.incarnation:
            account.begin(slot.incarnation, now)
        self._note_use(managed, now)
        account.peak = max(account.peak, found or 0)
        if slot.state not in _WATCHED:
            return
        unmonitored = account.watch.unmonitored
        limit = self._admission.limit_of(managed)
        idle = slot.state is ModelState.READY and not account.busy
        account.watch, order = enforcement.watch(account.watch, found, limit, self._config, now=now, idle=idle)
        if account.watch.unmonitored != unmonitored:
            self._host.journal.write(
                "memory_monitored" if unmonitored else "memory_unmonitored", level="WARNING", model=managed.model
            )
            self._changed()
        if order is not Order.NOTHING and found is not None:
            self._obey(managed, order, found, limit, now)
        slots = self._slots_of(managed)
        if slots != account.told_slots or ((slots or account.watch.closed) and now - account.told_at >= _TELL_S):
            self._tell(managed, now)
        if slot.state is ModelState.READY:
            self._pace.look(managed)
            self._settle(managed, now)
            self._rotate(managed, now, idle=idle)

    def _note_use(self, managed: Managed, now: float) -> None:
        account, beat = managed.account, managed.heartbeat
        if beat is None:
            account.busy = False
            return
        in_flight = beat.running + beat.waiting > 0
        if in_flight or beat.requests != account.served:
            account.used_at = now
        account.served = beat.requests
        # The self-test of an idle worker decodes, too, and nobody asked for it.
        account.busy = in_flight or (beat.phase in _BUSY and now - account.used_at < _WEIGH_S)

    def _obey(self, managed: Managed, order: Order, found: int, limit: int, now: float) -> None:
        share = round(found / limit, 3) if limit else 0.0
        if order in {Order.EASE, Order.ADMIT}:
            closed = order is Order.EASE
            self._tell(managed, now, clear=closed)
            self._host.journal.write(
                "memory_high" if closed else "memory_eased",
                level="WARNING" if closed else "INFO",
                model=managed.model,
                memory_bytes=found,
                limit_bytes=limit,
                share=share,
            )
            self._changed()
        elif order is Order.REPLACE:
            self._replace(managed, f"it uses {ledger.gib(found)} of {ledger.gib(limit)}", found, now)
        elif order is Order.END:
            self._end(managed, "memory_limit", f"it used {ledger.gib(found)} of {ledger.gib(limit)}", found)

    def _tell(self, managed: Managed, now: float, *, clear: bool = False) -> None:
        """Say to a worker what memory allows it."""
        account = managed.account
        account.told_at, account.told_slots = now, self._slots_of(managed)
        close_s = _CLOSE_S if account.watch.closed else 0.0
        managed.tell(control.Relieve(close_s, clear, account.told_slots, _CLOSE_S if account.told_slots else 0.0))

    def _slots_of(self, managed: Managed) -> int:
        """Return how many requests a model may run at once, 0 for all that are configured."""
        found = managed.capabilities
        return 0 if found is None else concurrency.slots(self._concurrency, found.max_concurrent_requests)

    def _replace(self, managed: Managed, why: str, found: int, now: float) -> None:
        account, slot = managed.account, managed.slot
        rested = account.replaced_at is None or now - account.replaced_at >= self._config.rotate_every_s
        if slot.state is not ModelState.READY or not rested:
            return
        account.replaced_at = now
        self._host.journal.write(
            "memory_rotation", level="WARNING", model=managed.model, pid=slot.pid, memory_bytes=found, reason=why
        )
        self._host.feed(managed, ev.Restart())

    def _end(self, managed: Managed, kind: str, why: str, found: int | None) -> None:
        """End a process at once: its requests are told first, then it is killed whatever it does."""
        if managed.verdict:
            return
        incarnation = managed.slot.incarnation
        managed.verdict, managed.last_words = kind, why
        self._host.journal.write(
            "memory_kill", level="ERROR", model=managed.model, pid=managed.slot.pid, memory_bytes=found, reason=why
        )
        managed.tell(control.Stop(why, "insufficient_memory"))

        def kill() -> None:
            if managed.slot.incarnation == incarnation:
                self._host.feed(managed, ev.Condemned(why))

        asyncio.get_running_loop().call_later(_LAST_WORDS_S, kill)

    # -- what is learnt -------------------------------------------------------------------------------------------

    def _settle(self, managed: Managed, now: float) -> None:
        """Compare what was predicted with what it is, once it has been ready and idle for a moment."""
        account, found, beat = managed.account, managed.memory_bytes, managed.heartbeat
        if account.ready_since is None:
            account.ready_since = now
        settled = account.settled or account.busy or found is None or beat is None
        if settled or found is None or beat is None or now - account.ready_since < _SETTLE_S:
            return
        account.settled, account.settled_mlx = found, beat.active_bytes + beat.cache_bytes
        prediction = account.prediction
        if prediction is None or prediction is UNREADABLE:
            return
        error = None if not prediction.idle > 0 else round(found / prediction.idle - 1, 4)
        self._host.journal.write(
            "memory_measured",
            model=managed.model,
            predicted_bytes=prediction.idle,
            measured_bytes=found,
            off_by=error,
            peak_bytes=account.peak,
        )
        module = self._host.config.worker.module
        self._history.learn(key_of(managed.path, prediction.weight_bytes, module), found, account.peak)

    def _rotate(self, managed: Managed, now: float, *, idle: bool) -> None:
        account, beat = managed.account, managed.heartbeat
        expected = None
        if account.settled and beat is not None:
            expected = account.settled - account.settled_mlx + beat.active_bytes + beat.cache_bytes
        account.watch, drifted = enforcement.drift(
            account.watch, managed.memory_bytes, expected, account.need, self._config, now=now, idle=idle
        )
        if drifted and expected is not None and managed.memory_bytes is not None:
            more = ledger.gib(managed.memory_bytes - expected)
            self._replace(managed, f"it holds {more} more than its model", managed.memory_bytes, now)

    # -- the machine ----------------------------------------------------------------------------------------------

    def _look_at_machine(self, now: float) -> None:
        meter, before = self._host.meter, self._whole
        self._machine, self._pressure = meter.machine(), meter.pressure()
        used = self._machine.used_share
        self._whole, dire = enforcement.whole(before, used, self._pressure, self._config, now)
        self._adapt(used, now)
        if self._whole.shedding != before.shedding:
            self._host.journal.write(
                "load_shedding_on" if self._whole.shedding else "load_shedding_off",
                level="WARNING",
                used_share=None if used is None else round(used, 3),
            )
            self._changed()
        if self._whole.unmonitored != before.unmonitored:
            self._host.journal.write(
                "memory_unmonitored" if self._whole.unmonitored else "memory_monitored", level="WARNING", model=""
            )
            self._changed()
        if dire and not self._host.holding:
            self._end_largest(now)
        if enforcement.should_ease(used, self._pressure, self._config) and now - self._eased_at >= _EASE_S:
            self._eased_at = now
            self._ease_all(now)

    def _ease_all(self, now: float) -> None:
        """Have every model drop what it keeps only for later: before anybody is refused."""
        for managed in self._host.models():
            if managed.slot.state is ModelState.READY and not managed.account.watch.closed:
                self._tell(managed, now, clear=True)

    def _adapt(self, used: float | None, now: float) -> None:
        before = self._concurrency.share
        self._concurrency = concurrency.adapt(self._concurrency, used, self._config, now)
        share = self._concurrency.share
        if share != before:
            found = None if used is None else round(used, 3)
            self._host.journal.write("concurrency_adapted", share=share, used_share=found)
            self._changed()

    def _end_largest(self, now: float) -> None:
        model = ledger.largest(self._admission.uses())
        managed = self._host.find(model) if model else None
        if managed is None or managed.slot.state not in _WATCHED:
            return
        self._whole = enforcement.ended(self._whole, now)
        self._end(
            managed, "memory_pressure", "the machine is out of memory and it is the largest", managed.memory_bytes
        )

    def _closed(self) -> str:
        if self._whole.critical or self._pressure is Pressure.CRITICAL:
            return "the machine is out of memory"
        return "the machine is short of memory" if self._whole.shedding else ""

    # -- what operators see ---------------------------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        """Return the host's part of the status document."""
        machine, config = self._machine, self._config
        held = [managed.memory_bytes for managed in self._host.slots.values() if managed.slot.pid]
        known = [each for each in held if each is not None]
        return {
            "total_bytes": machine.total,
            "available_bytes": machine.available,
            "used_bytes": sum(known) if len(known) == len(held) else None,
            "limit_bytes": ledger.budget(machine, config),
            "reserve_bytes": None if machine.total is None else ledger.reserve(machine.total, config),
            "free_bytes": ledger.free(machine, self._admission.uses(), config),
            "pressure": None if self._pressure is None else self._pressure.name.lower(),
            "machine_used_share": None if machine.used_share is None else round(machine.used_share, 4),
            "shed_share": config.shed,
            "shedding": self._whole.shedding,
            "concurrency_share": self._concurrency.share,
            "monitored": not self._whole.unmonitored,
        }

    def of_model(self, managed: Managed, now: float) -> dict[str, Any]:
        """Return the memory part of one model of the status document."""
        account, use = managed.account, self._admission.use_of(managed)
        prediction = account.prediction
        return {
            "predicted_bytes": None if prediction is None else prediction.idle,
            "need_bytes": account.need or None,
            "limit_bytes": (self._admission.limit_of(managed) or None) if managed.slot.pid else None,
            "pinned": use.pinned,
            "ttl_s": use.ttl_s or None,
            "idle_s": round(now - account.used_at, 1) if managed.slot.pid and account.used_at else None,
            "closed": account.watch.closed and managed.slot.pid != 0,
            "monitored": not account.watch.unmonitored,
            "pace": None if account.pace is None else round(account.pace, 2),
            "slow": account.pace is not None and account.pace < SLOW,
        }
