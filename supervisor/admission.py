"""Lets models in: asks the ledger before each load and each start, and unloads others to make room."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

from protocol import control
from protocol.modelfolder import ModelFolderError
from protocol.spec import MemoryLimits
from protocol.states import ModelState
from supervisor import events as ev
from supervisor import ledger
from supervisor.host import Host
from supervisor.ledger import Plan, Use, Verdict
from supervisor.managed import Managed
from supervisor.prediction import BASE_BYTES, UNREADABLE, History, Prediction, grant, predict
from supervisor.watching import Changes

FIT_SCHEMA: Final = "lmx.fit/1"
_LOOK_S: Final = 0.1
#: The footprint follows what MLX gives back some seconds later.
_EASE_S: Final = 6.0
_MAX_BUFFERS: Final = 4 * 1024**3
_MIN_BUFFERS: Final = 64 * 1024**2
_BUFFER_SHARE: Final = 0.1
#: Prefixes of one model, unless configured: this part of the machine's memory, at most so much.
_PREFIX_PART: Final = 16
_MAX_PREFIXES: Final = 4 * 1024**3
#: Sequences of `memory.kv_tokens` that a worker may keep beside the one that was reserved, where the machine is large.
_FULL_BATCH: Final = 7


class NoRoomError(Exception):
    """A model does not fit; the text says what it needs, what there is, and who would have to go."""


class Admission:
    """The one who asks the ledger. `forget(model)` is told of models that were unloaded for others."""

    def __init__(self, host: Host, changes: Changes, history: History, forget: Callable[[str], None]) -> None:
        self._host = host
        self._changes = changes
        self._history = history
        self._forget = forget
        self._config = host.config.memory
        #: Loads that were promised room and have no slot yet.
        self._promised: dict[str, int] = {}
        self._last_eviction: float | None = None
        #: Of this machine, whose size does not change.
        self._budget: int | None = None
        self._reading: dict[str, asyncio.Task[None]] = {}
        self._going: set[asyncio.Task[None]] = set()
        #: Says why no model may be started at all; empty in ordinary times.
        self.closed: Callable[[], str] = lambda: ""
        host.gate = self.may_start
        host.launcher.limits = self.limits

    # -- questions ------------------------------------------------------------------------------------------------

    def uses(self, *, without: str = "", waiting: bool = False) -> list[Use]:
        """Return the loaded models as the ledger sees them; with `waiting` also those that are to be started."""
        found = [
            self.use_of(managed)
            for managed in self._host.models()
            if managed.model != without
            and (managed.slot.pid or (waiting and managed.slot.waiting and not managed.account.short))
        ]
        if waiting:
            promised = [(model, need) for model, need in self._promised.items() if model != without]
            found += [Use(model, need, 0, ready=False) for model, need in promised]
        return found

    def limit_of(self, managed: Managed) -> int:
        """Return what the process of a model may occupy, 0 for no limit."""
        account = managed.account
        if self._budget is None:
            self._budget = ledger.budget(self._host.meter.machine(), self._config)
        found = account.prediction
        kv = account.need - found.idle if found is not None else 0
        settled = account.settled + kv if account.settled else 0
        prefixes = 0 if found is None else found.prefix_bytes
        wish = 0 if found is None else _FULL_BATCH * found.kv.bytes_for(found.tokens)
        return ledger.worker_limit(account.need + prefixes, settled + prefixes, self._budget, self._config, wish)

    def limits(self, model: str) -> MemoryLimits:
        """Return what MLX is told to keep to in the next process of a model."""
        config, managed = self._config, self._host.find(model)
        limit = 0 if managed is None else self.limit_of(managed)
        share = min(_MAX_BUFFERS, max(_MIN_BUFFERS, int(limit * _BUFFER_SHARE))) if limit else 0
        buffers = config.buffer_bytes or share
        prediction = None if managed is None else managed.account.prediction
        idle, reserved = (0, 0) if prediction is None else (prediction.idle, prediction.need - prediction.idle)
        prefixes = 0 if prediction is None else prediction.prefix_bytes
        return MemoryLimits(
            memory_bytes=max(limit - BASE_BYTES, limit // 2),
            buffer_bytes=buffers,
            clear_above_bytes=config.clear_above_bytes,
            clear_every_s=config.clear_every_s,
            kv_bytes=ledger.cache_budget(limit, idle, reserved, buffers + prefixes, config),
            prefix_bytes=prefixes,
        )

    async def fit(self, model: str, path: Path) -> dict[str, Any]:
        """Return the document lmx.fit/1; raise `ModelFolderError` for a folder that cannot be served."""
        prediction = await self._predicted(path)
        found = self._plan(model, prediction)
        return {
            "schema": FIT_SCHEMA,
            "model": model,
            "need_bytes": found.need,
            "available_bytes": found.available,
            "fits": found.verdict is Verdict.FITS,
            "would_evict": list(found.evict),
            "must_go": list(found.must_go),
            "loadable": found.verdict in {Verdict.FITS, Verdict.EVICT, Verdict.WAIT},
            "weight_bytes": prediction.weight_bytes,
            "kv_bytes_per_token": prediction.kv.token_bytes + prediction.kv.windowed_bytes,
            "reason": found.words or None,
        }

    def check_restart(self, managed: Managed) -> None:
        """Raise `NoRoomError` if the next process of a model would not fit in the place of the present one."""
        account = managed.account
        machine = self._machine_without(managed)
        if account.prediction is None or not managed.slot.pid or machine.available is None:
            return
        found = ledger.plan(
            account.need,
            machine,
            self.uses(without=managed.model),
            self._config,
            now=time.monotonic(),
            may_evict=False,
        )
        if found.verdict is Verdict.REFUSE:
            raise NoRoomError(_no_room(managed.model, found))

    def _machine_without(self, managed: Managed | None) -> ledger.Machine:
        """Return the machine as it would be without the present process of a model."""
        machine = self._host.meter.machine()
        if managed is None or not managed.slot.pid or machine.available is None:
            return machine
        return ledger.Machine(machine.total, machine.available + (managed.memory_bytes or 0), machine.gpu)

    # -- a load ---------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def room_for(self, model: str, path: Path) -> AsyncIterator[Prediction]:
        """Make room for a load and keep it while the block makes the slot; raise `NoRoomError`."""
        prediction = await self._predicted(path)
        found = self._plan(model, prediction)
        if found.verdict is not Verdict.FITS and self._ease(model, found):
            found = await self._eased(model, prediction)
        if found.words:
            raise NoRoomError(_no_room(model, found))
        prediction = self._granted(prediction, found)
        self._promised[model] = prediction.need
        try:
            if found.verdict is Verdict.EVICT:
                await self._evict(model, found)
            yield prediction
        finally:
            self._promised.pop(model, None)

    def _ease(self, model: str, plan: Plan) -> bool:
        """Have the cached prefixes of all models dropped if that could make room for a load; return whether it could.

        They go before any model does, and before a load is refused.
        """
        held = [
            (managed, min(found.prefix_bytes, (managed.memory_bytes or 0) - managed.account.need))
            for managed in self._host.models()
            if managed.model != model
            and managed.slot.state is ModelState.READY
            and (found := managed.account.prediction) is not None
        ]
        holding = [(managed, more) for managed, more in held if more > 0 and not managed.account.watch.closed]
        if plan.available is None or plan.need > plan.available + sum(more for _, more in holding):
            return False
        for managed, _ in holding:
            managed.tell(control.Relieve(clear=True, slots=managed.account.told_slots, slots_s=_EASE_S))
        return True

    async def _eased(self, model: str, prediction: Prediction) -> Plan:
        """Return the plan once what was dropped has come back, or after a moment."""
        until = time.monotonic() + min(_EASE_S, self._host.config.lifecycle.reclaim_s)
        while True:
            found = self._plan(model, prediction)
            if found.verdict is Verdict.FITS or time.monotonic() >= until:
                return found
            await asyncio.sleep(_LOOK_S)

    async def _predicted(self, path: Path) -> Prediction:
        tokens, module = self._config.kv_tokens, self._host.config.worker.module
        return await asyncio.to_thread(predict, path, tokens, self._history, module)

    def _plan(self, model: str, prediction: Prediction) -> Plan:
        return ledger.plan(
            prediction.need,
            self._machine_without(self._host.find(model)),
            self.uses(without=model, waiting=True),
            self._config,
            now=time.monotonic(),
            last_eviction=self._last_eviction,
        )

    async def _evict(self, model: str, found: Plan) -> None:
        self._last_eviction = time.monotonic()
        leaving = [managed for name in found.evict if (managed := self._host.find(name)) is not None]
        for managed in leaving:
            self.unload(managed, f"to make room for {model}")
        await self._changes.wait_for(lambda: not any(managed.slot.pid for managed in leaving))
        # What a process had comes back a moment after its end.
        until = time.monotonic() + self._host.config.lifecycle.reclaim_s
        while time.monotonic() < until:
            machine = self._host.meter.machine()
            room = ledger.free(machine, self.uses(without=model), self._config)
            if room is not None and room >= found.need:
                return
            await asyncio.sleep(_LOOK_S)
        msg = f"insufficient_memory: {model} needs {ledger.gib(found.need)}; {', '.join(found.evict)} went for it, and "
        raise NoRoomError(msg + "the memory did not come back: see lmx-supervisor status")

    # -- a way out ------------------------------------------------------------------------------------------------

    def unload(self, managed: Managed, why: str) -> None:
        """Let a model's requests end, and unload it; it is not brought back by itself."""
        if managed.account.leaving:
            return
        managed.account.leaving = why
        self._host.journal.write("model_evicted", model=managed.model, reason=why, memory_bytes=managed.memory_bytes)
        self._forget(managed.model)
        self._host.feed(managed, ev.Unwant())
        task = asyncio.get_running_loop().create_task(self._gone(managed))
        self._going.add(task)
        task.add_done_callback(self._going.discard)

    async def _gone(self, managed: Managed) -> None:
        await self._changes.wait_for(lambda: managed.slot.state is ModelState.STOPPED or managed.slot.wanted)
        managed.account.leaving = ""
        if not managed.slot.wanted and self._host.slots.get(managed.name) is managed:
            self._host.remove(managed)

    def close(self) -> None:
        """Stop waiting."""
        for task in (*self._going, *self._reading.values()):
            task.cancel()

    # -- a start --------------------------------------------------------------------------------------------------

    def may_start(self, managed: Managed, now: float) -> bool:
        """Return whether there is room for the next process of a model; if not, say so once and in `blocked`."""
        account = managed.account
        if account.prediction is None:
            return self._read(managed)
        words = self.closed()
        found = ledger.plan(
            account.need,
            self._host.meter.machine(),
            self.uses(without=managed.model),
            self._config,
            now=now,
            may_evict=False,
        )
        # One that ran before is no new load: while nothing is known it gets its place back.
        if found.verdict is Verdict.REFUSE or (found.verdict is Verdict.UNKNOWN and not managed.slot.incarnation):
            words = words or found.words
        if words and not account.short:
            self._host.journal.write(
                "insufficient_memory",
                level="ERROR",
                model=managed.model,
                needed_bytes=account.need,
                available_bytes=found.available,
                reason=words,
            )
        if words:
            managed.blocked = f"INSUFFICIENT MEMORY: {words}. It starts when there is room"
        elif account.short:
            managed.blocked = ""
        account.short = bool(words)
        if not words:
            account.prediction = self._granted(account.prediction, found)
        return not words

    def _granted(self, prediction: Prediction, found: Plan) -> Prediction:
        """Return the prediction with what its model may keep of prefixes: nobody is refused or unloaded for those."""
        config, total = self._host.config.prefix, self._host.meter.machine().total
        wanted = config.ram_bytes or min(_MAX_PREFIXES, (total or 0) // _PREFIX_PART)
        return grant(prediction, found.available, wanted if config.enabled else 0)

    def _read(self, managed: Managed) -> bool:
        """Look into the folder of a model first; what cannot be read its worker shall complain of."""
        if managed.name not in self._reading:
            task = asyncio.get_running_loop().create_task(self._fill_in(managed))
            self._reading[managed.name] = task
        return False

    async def _fill_in(self, managed: Managed) -> None:
        try:
            managed.account.prediction = await self._predicted(Path(managed.path))
        except (ModelFolderError, OSError):
            managed.account.prediction = UNREADABLE
        finally:
            self._reading.pop(managed.name, None)
            self._host.wake()

    async def fill_in(self, managed: Managed) -> None:
        """Predict for a model whose process came from an earlier supervisor."""
        if managed.account.prediction is None and managed.name not in self._reading:
            await self._fill_in(managed)

    def use_of(self, managed: Managed) -> Use:
        """Return one model as the ledger sees it."""
        account, slot, beat = managed.account, managed.slot, managed.heartbeat
        configured = self._config.ttl_s
        in_flight = beat is not None and beat.running + beat.waiting > 0
        return Use(
            model=managed.model,
            need=account.need,
            footprint=managed.memory_bytes if slot.pid else 0,
            busy=account.busy or in_flight or slot.late,
            ready=slot.state is ModelState.READY and not account.leaving,
            pinned=account.pinned or managed.model in self._config.pinned,
            used_at=account.used_at,
            ttl_s=configured if account.ttl_s is None else account.ttl_s,
        )


def _no_room(model: str, found: Plan) -> str:
    return f"insufficient_memory: {model} {found.words}" if found.available is not None else found.words
