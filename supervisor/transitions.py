"""What the journal says of a slot that has changed."""

from protocol.states import ModelState
from supervisor.journal import Journal
from supervisor.managed import Managed
from supervisor.recovery import Recovery
from supervisor.slot import Slot


def write_down(journal: Journal, recovery: Recovery, managed: Managed, before: Slot) -> None:
    """Write what became of a slot that was `before`; nothing if nothing that matters did."""
    slot = managed.slot
    if slot.late and not before.late:
        journal.write("heartbeat_late", level="WARNING", model=managed.model, slot=managed.name, pid=slot.pid)
    if slot.state is before.state:
        return
    trouble = slot.state in {ModelState.BACKOFF, ModelState.QUARANTINED}
    journal.write(
        "model_readiness_changed" if managed.model else "gateway_state_changed",
        level="WARNING" if trouble else "INFO",
        model=managed.model,
        state=slot.state.value,
        was=before.state.value,
        pid=slot.pid or before.pid,
        incarnation=slot.incarnation,
        reason=slot.reason,
    )
    if not managed.model:
        return
    end = slot.last_exit
    if slot.state is ModelState.QUARANTINED and end is not None and end is not before.last_exit and not end.permanent:
        journal.write("crash_loop_detected", level="ERROR", model=managed.model, reason=slot.reason)
    recovery.on_state(managed.model, slot.state, slot.reason)
