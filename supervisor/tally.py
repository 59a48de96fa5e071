"""How often what has happened, for the metrics: counted as the journal is written, from zero with each supervisor."""

import contextlib
from collections import Counter
from typing import Any, Final

import msgspec

from protocol.states import ModelState

#: More kinds than any host has models and classes of ends; what comes later is counted without its model.
_MAX_KINDS: Final = 4000
OTHER: Final = "other"
#: Of these each entry counts, by its model.
_BY_MODEL: Final = {
    "model_evicted": "evictions",
    "memory_kill": "memory_kills",
    "memory_rotation": "memory_rotations",
    "hung": "hangs",
}
_ASKED: Final = "asked"


class _Entry(msgspec.Struct):
    event: str
    model: str = ""
    exit_class: str = ""
    state: str = ""
    action: str = ""


class Tally:
    """Counts by name, model and kind (a class of ends, an event, an action)."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, str]] = Counter()
        #: How the last process of each model ended, so that its restart has a reason.
        self._ends: dict[str, str] = {}
        self._decoder = msgspec.json.Decoder(_Entry)

    def hear(self, line: bytes) -> None:
        """Take an entry of the journal."""
        with contextlib.suppress(msgspec.MsgspecError):
            self._take(self._decoder.decode(line))

    def document(self) -> list[dict[str, Any]]:
        """Return the counts: `name`, `model`, `kind`, `value`."""
        return [
            {"name": name, "model": model, "kind": kind, "value": value}
            for (name, model, kind), value in sorted(self._counts.items())
        ]

    def _take(self, entry: _Entry) -> None:
        self._count("lifecycle_events", "", entry.event)
        if entry.event in _BY_MODEL:
            self._count(_BY_MODEL[entry.event], entry.model)
        elif entry.event == "process_exited":
            self._ended(entry)
        elif entry.event == "process_started" and entry.model in self._ends:
            self._count("worker_restarts", entry.model, self._ends.pop(entry.model))
        elif entry.event == "model_readiness_changed":
            if entry.state == ModelState.QUARANTINED:
                self._count("quarantines", entry.model)
            elif entry.state == ModelState.STOPPED:
                self._ends.pop(entry.model, None)  # its next start is no restart
        elif entry.event == "admin_action":
            self._count("admin_actions", "", entry.action)

    def _ended(self, entry: _Entry) -> None:
        if not entry.model:
            self._count("gateway_exits", "", entry.exit_class)
            return
        self._count("worker_exits", entry.model, entry.exit_class)
        self._ends[entry.model] = entry.exit_class
        # The canary is what a worker does between loading and ready, and now and then when it is idle.
        failed = entry.state == ModelState.WARMING and entry.exit_class != _ASKED
        if failed or entry.exit_class == "canary_mismatch":
            self._count("canary_failures", entry.model)

    def _count(self, name: str, model: str, kind: str = "") -> None:
        key = (name, model, kind)
        if key not in self._counts and len(self._counts) >= _MAX_KINDS:
            key = (name, OTHER if model else "", OTHER if kind else "")
        self._counts[key] += 1
