"""What ended a process, and its crash record: written, corrected and completed as more is heard of it."""

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from supervisor.crashes import CrashRecord, CrashStore, crash_id, versions
from supervisor.exits import ExitRecord, classify
from supervisor.journal import Journal
from supervisor.managed import Managed
from supervisor.output import stacks_in
from supervisor.platform.reports import killed_by_jetsam, report_folders
from supervisor.second_look import SecondLook
from supervisor.slot import Slot

_MAX_CASUALTIES: Final = 256


class CrashReports:
    """The crash records of all slots.

    `knows(model)` says whether a model has a slot: of others nothing is kept. `corrected(managed, was, better)` is
    told of an end that the system explained later.
    """

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        *,
        knows: Callable[[str], bool],
        corrected: Callable[[Managed, ExitRecord, ExitRecord], None],
    ) -> None:
        self.store = CrashStore(folder)
        #: Where the system writes its own reports.
        self.folders = report_folders()
        self.second_look = SecondLook()
        self._journal = journal
        self._knows = knows
        self._corrected = corrected
        #: The newest crash record of each model, and what a gateway said of a crash before we saw it.
        self._newest: dict[str, CrashRecord] = {}
        self._casualties: dict[tuple[str, int], tuple[str, ...]] = {}

    def explain(self, managed: Managed, returncode: int | None, tail: str, *, at: float, asked: bool) -> ExitRecord:
        """Return what ended the process of a slot. `tail` is of its stderr, `asked` whether it was told to end."""
        condemned = managed.slot.condemned
        return classify(
            returncode,
            at=at,
            asked=asked,
            hung=bool(condemned),
            last_words=managed.last_words or condemned,
            stderr_tail=tail,
            verdict=managed.verdict,
            jetsam=returncode == -signal.SIGKILL and self._jetsam(managed),
        )

    def make(self, managed: Managed, end: ExitRecord, tail: str) -> CrashRecord | None:
        """Return the record of an end that was not asked for, and arrange a second look at it."""
        slot, box, now = managed.slot, managed.box, time.monotonic()
        made = None
        if end.name != "asked":
            made = CrashRecord(
                id=crash_id(end.at, managed.name, slot.incarnation),
                model=managed.model,
                slot=managed.name,
                incarnation=slot.incarnation,
                pid=slot.pid,
                at=end.at,
                kind=end.name,
                words=end.reason,
                hint=end.hint,
                code=end.code,
                signal=end.signal,
                phase=(managed.heartbeat.phase if managed.heartbeat else slot.state).value,
                step=slot.step,
                uptime_s=0.0 if box is None else round(now - box.since, 3),
                memory=() if box is None else box.memory(now),
                stderr_tail=tail,
                versions=versions(),
                degraded=slot.degraded,
            )
        since = end.at if box is None else box.since_unix
        self.second_look.arrange(
            end, slot.pid, since, self.folders, lambda better: self._reclassify(managed, slot, end, better)
        )
        return made

    def write(self, report: CrashRecord, tail: str) -> None:
        """Write a record down, with the requests that a gateway has named already."""
        early = self._casualties.pop((report.model, report.incarnation), ())
        written = self.store.write(msgspec.structs.replace(report, requests=early), stacks=stacks_in(tail))
        if written is not None:
            self._newest[report.model] = written

    def name_casualties(self, model: str, incarnation: int, requests: Sequence[str]) -> None:
        """Note in the crash record which requests a process had; the gateway may say so before or after its end."""
        named = tuple(requests[:_MAX_CASUALTIES])
        report = self._newest.get(model)
        if report is not None and report.incarnation == incarnation:
            self._newest[model] = msgspec.structs.replace(report, requests=named)
            self.store.rewrite(self._newest[model])
        elif self._knows(model):
            self._casualties = {key: value for key, value in self._casualties.items() if key[0] != model}
            self._casualties[model, incarnation] = named

    def forget(self, model: str) -> None:
        """Its slot is gone; the files stay."""
        self._newest.pop(model, None)

    def close(self) -> None:
        """Look no more."""
        self.second_look.close()

    def _reclassify(self, managed: Managed, slot: Slot, was: ExitRecord, better: ExitRecord) -> None:
        """A report of the system explains the end of an earlier process of this slot."""
        crash, report = "", self._newest.get(managed.model)
        if report is not None and report.incarnation == slot.incarnation:
            report = msgspec.structs.replace(report, kind=better.name, words=better.reason, hint=better.hint)
            self._newest[managed.model] = report
            self.store.rewrite(report)
            crash = report.id
        self._journal.write(
            "exit_reclassified",
            level="WARNING",
            model=managed.model,
            slot=managed.name,
            pid=slot.pid,
            incarnation=slot.incarnation,
            was=was.name,
            exit_class=better.name,
            reason=better.reason,
            crash=crash,
        )
        self._corrected(managed, was, better)

    def _jetsam(self, managed: Managed) -> bool:
        since = time.time() if managed.box is None else managed.box.since_unix
        return bool(killed_by_jetsam(managed.slot.pid, since, self.folders))
