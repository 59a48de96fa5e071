"""The life of one supervised process as a pure function: `advance(slot, event, now, settings)` → slot and actions.

Nothing here does IO or reads a clock. `now` is monotonic seconds. The daemon feeds in what happened and carries out
the actions. A slot is a place for one process at a time; each process in it is an incarnation.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from protocol.config import LifecycleConfig
from protocol.states import ModelState, Phase
from supervisor import events as ev
from supervisor.events import Action, Event
from supervisor.exits import ExitRecord
from supervisor.restarts import History, after_failure
from supervisor.slot import COMING_UP, Settings, Slot

_GIB: Final = 1024**3
#: A footprint below this share of the last one is falling; and how long a fall may pause.
_FELL: Final = 0.99
#: And by so much at least: on Linux a small process seems to fall whenever a stranger maps the same libraries.
_FELL_BYTES: Final = 16 * 1024**2
_FALL_PAUSE_S: Final = 5.0
#: Deadlines that end nothing.
_MILD: Final = frozenset({"late", "stable"})

Outcome = tuple[Slot, tuple[Action, ...]]

#: Between the stack dump of a hung process and SIGTERM, and from there to SIGKILL.
DUMP_TO_TERM_S: Final = 1.0
TERM_TO_KILL_S: Final = 2.0


def advance(slot: Slot, event: Event, now: float, settings: Settings) -> Outcome:
    """Return the slot after `event` and what to do about it. Total: every event is allowed in every state."""
    match event:
        case ev.Want() | ev.Unwant() | ev.Restart() | ev.Reset() | ev.SetAside():
            return _decided(slot, event, now, settings)
        case ev.Started(pid, incarnation, degraded):
            return _started(slot, pid, incarnation, now, degraded=degraded), ()
        case ev.Adopted(pid, incarnation, phase):
            return _adopted(slot, pid, incarnation, phase, now), ()
        case ev.Exited(record, luck):
            return _exited(slot, record, luck, now, settings), ()
        case ev.Reclassified(was, record):
            return _reclassified(slot, was, record), ()
        case ev.SpawnFailed(record, luck):
            return _failed(slot, record, luck, now, settings), ()
        case ev.Condemned(reason):
            if not slot.alive or slot.state is ModelState.STOPPING:
                return slot, ()
            return _to(slot, ModelState.STOPPING, now, condemned=reason, reason=reason, killed=True), (Action.KILL,)
        case ev.Weighed(footprint):
            falls = footprint < min(slot.footprint * _FELL, slot.footprint - _FELL_BYTES)
            fell = falls and slot.state is ModelState.STOPPING
            return msgspec.structs.replace(slot, footprint=footprint, fell_at=now if fell else slot.fell_at), ()
        case ev.Tick(late_s):
            return _tick(slot, late_s, now, settings.config)
        case _:
            return _reported(slot, event, now)


def _decided(slot: Slot, event: Event, now: float, settings: Settings) -> Outcome:
    """What an operator, or the record of earlier runs, wants."""
    match event:
        case ev.Want():
            return _want(slot, now), ()
        case ev.Unwant(force):
            return _leave(msgspec.structs.replace(slot, wanted=False), now, force=force)
        case ev.Restart(force):
            fresh = _reset(msgspec.structs.replace(slot, wanted=True), now)
            return _leave(fresh, now, force=force) if slot.alive else (fresh, ())
        case ev.Reset():
            return _reset(slot, now), ()
        case ev.SetAside(reason):
            if slot.alive or not settings.policy.quarantine:
                return slot, ()
            return _to(slot, ModelState.QUARANTINED, now, wanted=True, reason=reason, probe_at=0.0), ()
    return slot, ()


def may_start(slots: Sequence[Slot], now: float) -> int | None:
    """Return the index of the slot to start next: the one that waits longest, if no other is coming up."""
    if any(slot.coming_up for slot in slots):
        return None
    due = [(slot.retry_at, i) for i, slot in enumerate(slots) if slot.waiting and slot.retry_at <= now]
    return min(due)[1] if due else None


def next_deadline(slot: Slot, settings: Settings) -> float | None:
    """Return when the slot next needs a `Tick`, None if time alone changes nothing."""
    if slot.waiting:
        return slot.retry_at
    if not slot.alive:
        probing = slot.wanted and slot.state is ModelState.QUARANTINED and slot.probe_at > 0
        return slot.probe_at if probing else None
    return min(when for when, _ in _deadlines(slot, settings.config))


def weigh(slot: Slot, weight_bytes: int) -> Slot:
    """Return the slot with the size of its model, from which time limits follow."""
    return msgspec.structs.replace(slot, weight_bytes=weight_bytes)


# -- transitions ------------------------------------------------------------------------------------------------


def _to(slot: Slot, state: ModelState, now: float, **changes: object) -> Slot:
    return msgspec.structs.replace(slot, state=state, since=now, **changes)


def _want(slot: Slot, now: float) -> Slot:
    slot = msgspec.structs.replace(slot, wanted=True)
    return _reset(slot, now) if slot.state in {ModelState.STOPPED, ModelState.QUARANTINED} else slot


def _reset(slot: Slot, now: float) -> Slot:
    slot = msgspec.structs.replace(slot, history=History(), probes=0, probing=False, probe_at=0.0)
    if slot.wanted and slot.state in {ModelState.STOPPED, ModelState.QUARANTINED, ModelState.BACKOFF}:
        return _to(slot, ModelState.STARTING, now, retry_at=now, reason="")
    return slot


def _leave(slot: Slot, now: float, *, force: bool) -> Outcome:
    if not slot.alive:
        return _to(slot, ModelState.STOPPED, now, pid=0, reason=""), ()
    if slot.state is ModelState.STOPPING:
        return slot, ()
    if slot.state is ModelState.READY and not force:
        return _to(slot, ModelState.DRAINING, now), (Action.ASK_DRAIN,)
    if slot.state is ModelState.DRAINING and not force:
        return slot, ()
    return _to(slot, ModelState.STOPPING, now), (Action.ASK_STOP,)


def _started(slot: Slot, pid: int, incarnation: int, now: float, *, degraded: bool = False) -> Slot:
    return _to(
        slot,
        ModelState.STARTING,
        now,
        pid=pid,
        incarnation=incarnation,
        restarts=slot.restarts + (1 if slot.incarnation else 0),
        ready_at=None,
        done_bytes=0,
        moved_at=now,
        beat_at=now,
        step=0,
        step_at=now,
        phase=Phase.LOADING,
        late=False,
        condemned="",
        terminated=False,
        killed=False,
        degraded=degraded,
        footprint=0,
        fell_at=0.0,
        reason="",
    )


def _adopted(slot: Slot, pid: int, incarnation: int, phase: Phase, now: float) -> Slot:
    restarts = slot.restarts
    slot = msgspec.structs.replace(_started(slot, pid, incarnation, now), restarts=restarts, phase=phase)
    match phase:
        case Phase.LOADING:
            return _to(slot, ModelState.LOADING, now)
        case Phase.WARMING:
            return _to(slot, ModelState.WARMING, now)
        case Phase.DRAINING:
            return _to(slot, ModelState.DRAINING, now)
        case _:
            return _to(slot, ModelState.READY, now, ready_at=now)


def _reported(slot: Slot, event: Event, now: float) -> Outcome:
    """What the process says of itself. Late words of a process that is gone or going change nothing."""
    if not slot.alive:
        return slot, ()
    slot = msgspec.structs.replace(slot, beat_at=now, late=False)
    match event:
        case ev.Helloed() if slot.state is ModelState.STARTING:
            return _to(slot, ModelState.LOADING, now, moved_at=now), ()
        case ev.Moved(done, total):
            moved_at = now if done > slot.done_bytes else slot.moved_at
            return msgspec.structs.replace(slot, done_bytes=done, total_bytes=total, moved_at=moved_at), ()
        case ev.BecameReady(load_s) if slot.state in COMING_UP:
            return _to(slot, ModelState.READY, now, ready_at=now, load_s=load_s, step_at=now, phase=Phase.IDLE), ()
        case ev.Beat(phase, step):
            return _beat(slot, phase, step, now), ()
        case ev.HasDrained() if slot.state in {ModelState.DRAINING, ModelState.READY}:
            # A ready one was told so by an earlier supervisor, or by a signal: it would refuse everyone for ever.
            return _to(slot, ModelState.STOPPING, now), (Action.ASK_STOP,)
    return slot, ()


def _beat(slot: Slot, phase: Phase, step: int, now: float) -> Slot:
    # A step counter only proves progress while there is work; a phase that just began counts from now.
    moved = step != slot.step or phase is not slot.phase or phase is Phase.IDLE
    slot = msgspec.structs.replace(slot, phase=phase, step=step, step_at=now if moved else slot.step_at)
    if phase is Phase.WARMING and slot.state is ModelState.LOADING:
        return _to(slot, ModelState.WARMING, now)
    return slot


def _exited(slot: Slot, record: ExitRecord, luck: float, now: float, settings: Settings) -> Slot:
    asked = slot.state is ModelState.STOPPING and not slot.condemned
    if asked or not slot.wanted:
        gone = msgspec.structs.replace(slot, pid=0, last_exit=record, ready_at=None)
        if slot.wanted:
            return _to(gone, ModelState.STARTING, now, retry_at=now)
        return _to(gone, ModelState.STOPPED, now)
    return _failed(slot, record, luck, now, settings)


def _failed(slot: Slot, record: ExitRecord, luck: float, now: float, settings: Settings) -> Slot:
    ready_for = None if slot.ready_at is None else now - slot.ready_at
    gone = msgspec.structs.replace(slot, pid=0, last_exit=record, ready_at=None)
    if record.permanent and settings.policy.quarantine:
        return _set_aside(gone, record.reason, now, settings)
    if not record.counted:
        return _to(gone, ModelState.BACKOFF, now, retry_at=now + record.extra_delay_s, reason=record.reason)
    verdict = after_failure(
        settings.policy,
        slot.history,
        now=now,
        ready_for_s=ready_for,
        load_s=slot.load_s,
        luck=luck,
        at_least_s=record.extra_delay_s,
    )
    gone = msgspec.structs.replace(gone, history=verdict.history)
    if verdict.why is not None or slot.probing:
        why = verdict.why or "failed again when it was tried"
        return _set_aside(gone, f"{why}; last: {record.reason}", now, settings)
    return _to(gone, ModelState.BACKOFF, now, retry_at=now + verdict.delay_s, reason=record.reason)


def _reclassified(slot: Slot, was: ExitRecord, record: ExitRecord) -> Slot:
    if slot.last_exit != was:
        return slot
    slot = msgspec.structs.replace(slot, last_exit=record)
    if slot.state is not ModelState.BACKOFF:
        return slot
    retry_at = max(slot.retry_at, slot.since + record.extra_delay_s)
    return msgspec.structs.replace(slot, retry_at=retry_at, reason=record.reason)


def _set_aside(slot: Slot, reason: str, now: float, settings: Settings) -> Slot:
    """Into quarantine, with the time of the next try by itself if its last end allows one."""
    delays = settings.config.probe_delays_s
    allowed = slot.last_exit is not None and slot.last_exit.probe and not slot.last_exit.permanent
    probe_at = now + delays[min(slot.probes, len(delays) - 1)] if delays and allowed else 0.0
    return _to(slot, ModelState.QUARANTINED, now, reason=reason, probe_at=probe_at, probing=False)


# -- time -------------------------------------------------------------------------------------------------------


def _deadlines(slot: Slot, config: LifecycleConfig) -> list[tuple[float, str]]:
    """Return every (time, reason) at which the live process is out of time, in its present state."""
    gib = slot.weight_bytes / _GIB
    match slot.state:
        case ModelState.STARTING:
            return [(slot.since + config.hello_s, f"did not say hello within {config.hello_s:g} s")]
        case ModelState.LOADING:
            limit = config.load_base_s + config.load_per_gib_s * gib
            stall = max(slot.moved_at, slot.since) + config.load_stall_s
            return [
                (slot.since + limit, f"did not load within {limit:g} s"),
                (stall, f"read no weights for {config.load_stall_s:g} s"),
                *_beats(slot, config),
            ]
        case ModelState.WARMING:
            limit = config.warm_up_s
            return [(slot.since + limit, f"did not generate its first token within {limit:g} s"), *_beats(slot, config)]
        case ModelState.DRAINING:
            return [(slot.since + config.drain_s, "drained"), *_beats(slot, config)]
        case ModelState.STOPPING:
            return [(_stopping_deadline(slot, config), "stop")]
        case _:
            stable = [((slot.ready_at or 0.0) + config.stable_s, "stable")] if slot.probing else []
            return [*_beats(slot, config), *_steps(slot, config), *stable]


def _beats(slot: Slot, config: LifecycleConfig) -> list[tuple[float, str]]:
    hung = (slot.beat_at + config.heartbeat_hung_s, f"sent no heartbeat for {config.heartbeat_hung_s:g} s")
    return [hung] if slot.late else [hung, (slot.beat_at + config.heartbeat_late_s, "late")]


def _steps(slot: Slot, config: LifecycleConfig) -> list[tuple[float, str]]:
    if slot.phase is Phase.PREFILL:
        return [(slot.step_at + config.prefill_s, f"made no progress in prefill for {config.prefill_s:g} s")]
    if slot.phase is Phase.DECODE:
        return [(slot.step_at + config.decode_s, f"made no progress in decode for {config.decode_s:g} s")]
    return []


def _stopping_deadline(slot: Slot, config: LifecycleConfig) -> float:
    if slot.killed:
        return slot.since + 3600.0  # nothing is stronger than SIGKILL; look again rarely
    if slot.condemned:
        return slot.since + (DUMP_TO_TERM_S + TERM_TO_KILL_S if slot.terminated else DUMP_TO_TERM_S)
    grace = config.stop_base_s + config.stop_per_gib_s * slot.weight_bytes / _GIB
    until = slot.since + min(max(config.stop_min_s, grace), config.stop_max_s)
    if slot.fell_at > slot.since:
        # The system is still taking its memory back; killing a huge, wedged process can strand wired memory.
        until = max(until, min(slot.fell_at + _FALL_PAUSE_S, slot.since + config.stop_falling_max_s))
    return until


def _tick(slot: Slot, late_s: float, now: float, config: LifecycleConfig) -> Outcome:
    if not slot.alive:
        return _probe(slot, now), ()
    if late_s > config.slept_s:
        return _forget_time(slot, now), ()
    due = [(when, why) for when, why in _deadlines(slot, config) if when <= now]
    if not due:
        return slot, ()
    why = min(due)[1] if len(due) == 1 else next((w for _, w in sorted(due) if w not in _MILD), min(due)[1])
    if slot.state is ModelState.STOPPING:
        return _insist(slot, now)
    if why == "stable":
        return msgspec.structs.replace(slot, probing=False, probes=0, history=History()), ()
    if why == "late":
        return msgspec.structs.replace(slot, late=True), ()
    if why == "drained":
        return _to(slot, ModelState.STOPPING, now), (Action.ASK_STOP,)
    return _to(slot, ModelState.STOPPING, now, condemned=why, reason=why), (Action.DUMP_STACKS,)


def _probe(slot: Slot, now: float) -> Slot:
    """Half open: a model in quarantine is tried once more when its time has come."""
    due = slot.wanted and slot.state is ModelState.QUARANTINED and 0 < slot.probe_at <= now
    if not due:
        return slot
    return _to(slot, ModelState.STARTING, now, retry_at=now, probe_at=0.0, probes=slot.probes + 1, probing=True)


def _insist(slot: Slot, now: float) -> Outcome:
    if slot.condemned and not slot.terminated:
        return msgspec.structs.replace(slot, terminated=True), (Action.TERMINATE,)
    # From now on: a process that survives SIGKILL is looked at again in an hour, not without pause after one.
    return _to(slot, ModelState.STOPPING, now, killed=True), (Action.KILL,)


def _forget_time(slot: Slot, now: float) -> Slot:
    """The machine slept: no deadline that ran meanwhile says anything about the process."""
    return msgspec.structs.replace(slot, since=now, moved_at=now, beat_at=now, step_at=now, late=False)
