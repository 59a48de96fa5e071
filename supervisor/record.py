"""What the next supervisor has to know of this one: `state/runtime`, written whenever processes come or go."""

import os
import time
from collections.abc import Callable
from typing import Any

from protocol.logs import event
from protocol.states import ModelState
from supervisor.host import Host
from supervisor.intent import Intent
from supervisor.launch import SPARE
from supervisor.store import ChildRecord, Runtime, Store


class Record:
    """Owns the runtime state from its first writing on. `status` returns the status document, kept as a snapshot."""

    def __init__(
        self, host: Host, store: Store, intent: Intent, started_at: float, status: Callable[[], dict[str, Any]]
    ) -> None:
        self._host = host
        self._store = store
        self._intent = intent
        self._started_at = started_at
        self._status = status
        self._children: tuple[ChildRecord, ...] = ()
        self._states: tuple[tuple[str, ModelState], ...] = ()
        self._load_mark = ""
        self._loaded_at_stop: tuple[str, ...] = ()

    @property
    def loaded(self) -> tuple[str, ...]:
        """The models that are live or should be; once everything is being ended, those that were."""
        return self._loaded_at_stop or tuple(m.model for m in self._host.models() if m.slot.wanted)

    def begin(self, expected: tuple[ChildRecord, ...]) -> None:
        """Mark this run as unclean until it ends well; `expected` live and have not introduced themselves yet."""
        self._children = expected
        self.save()

    def mark_load(self, model: str) -> None:
        """Write down that a load begins, before it does: a kernel panic leaves no other trace of the model."""
        self._load_mark = model
        self.save()

    def follow(self) -> None:
        """Write again if processes or states differ from what is written."""
        children = self._living()
        if self._load_mark and not any(m.slot.coming_up for m in self._host.models()):
            self._load_mark = ""
            self._children = ()
        states = tuple((m.model, m.slot.state) for m in self._host.models())
        if (children, states) != (self._children, self._states) and not self._host.holding:
            self._states = states
            self.save()

    def freeze_loaded(self) -> None:
        """Everything is about to be ended: what is live now is to be live again."""
        self._loaded_at_stop = self.loaded

    def save(self, *, clean: bool = False, reason: str = "", handover: bool = False) -> None:
        """Write. `clean`: for the last time, for that reason; `handover`: to the next image of this process."""
        if not self._host.holding or clean:
            self._children = self._living()
        self._store.save_runtime(
            Runtime(
                pid=os.getpid(),
                boot_id=self._host.platform.boot_id(),
                started_at=self._started_at,
                starts=self._intent.starts,
                incarnation=self._host.incarnation,
                children=self._children,
                loaded_models=self.loaded,
                last_clean_shutdown=clean,
                shutdown_reason=reason,
                load_mark=self._load_mark,
                handover=handover,
                saved_at=time.time(),
                snapshot=self._status(),
            )
        )
        if self._store.durable:
            event("runtime_state_saved", level="DEBUG")

    def _living(self) -> tuple[ChildRecord, ...]:
        children = [
            ChildRecord(m.name, m.model, m.slot.incarnation, m.child.pid, m.child.started)
            for m in self._host.slots.values()
            if m.child is not None
        ]
        spare = self._host.spare
        if spare is not None and spare.child is not None:
            children.append(ChildRecord(SPARE, "", spare.incarnation, spare.child.pid, spare.child.started))
        return tuple(children)
