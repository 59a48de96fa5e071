"""What should be live, and whether to trust it: the stored intent of operators, panic strikes, safe mode."""

import time
from collections.abc import Callable

import msgspec

from protocol.config import Config
from protocol.logs import event
from protocol.paths import Home
from supervisor.journal import Journal
from supervisor.safety import Strike, crash_loop_of_supervisor, panic_loop, struck, with_strike, without_model
from supervisor.store import Desired, DesiredModel, Runtime, Store, remember_start


class Intent:
    """Owns the `desired` state file. Every change is stored at once."""

    def __init__(self, home: Home, config: Config, store: Store, journal: Journal) -> None:
        self._home = home
        self._config = config
        self._store = store
        self._journal = journal
        self._desired = Desired()
        self._suspect = ""
        #: Start times of the supervisor since its last clean stop.
        self.starts: tuple[float, ...] = ()
        #: Why nothing is loaded by itself; empty in ordinary times.
        self.safe_mode = ""

    def begin(
        self, desired: Desired, before: Runtime, *, boot_id: str, now: float, panic: Callable[[float], str]
    ) -> None:
        """Take the stored intent and judge the last run. `panic(since)` returns the words of a kernel panic, or ""."""
        self._desired = desired
        self.starts = remember_start(() if before.last_clean_shutdown else before.starts, now)
        rebooted = bool(before.boot_id) and before.boot_id != boot_id
        if rebooted and not before.last_clean_shutdown and before.load_mark:
            self._suspect = before.load_mark
            words = panic(before.started_at)
            if words:
                self._strike(before.load_mark, now, words)
        panics = panic_loop(self._desired.strikes, now)
        if panics:
            self._change(safe_mode=panics)
        crash_loop = crash_loop_of_supervisor(self.starts, now, self._config.lifecycle)
        if crash_loop:
            self._journal.write("crash_loop_detected", level="ERROR", reason=crash_loop)
        self.safe_mode = self._desired.safe_mode or crash_loop
        if self.safe_mode:
            self._journal.write("safe_mode_activated", level="ERROR", reason=self.safe_mode)

    def to_load(self) -> list[DesiredModel]:
        """Return what should be live: the stored intent, then configured models that nobody unloaded."""
        models = list(self._desired.models)
        known = {model.id for model in models} | set(self._desired.unloaded)
        for model in self._config.models.auto_load:
            folder = self._home.models / model.replace("/", "--", 1)
            if model in known:
                continue
            if folder.is_dir():
                models.append(DesiredModel(model, str(folder), time.time()))
            else:
                event("auto_load_skipped", level="WARNING", model=model, hint=f"lmx-supervisor pull {model}")
        # The safest first: what was being loaded when the machine went down comes last.
        return sorted(models, key=lambda model: model.id == self._suspect)

    def why_not(self, model: str) -> str:
        """Return why a model must not be loaded by itself, "" if it may."""
        return struck(self._desired.strikes, model)

    def want(self, model: str, path: str, added_at: float, *, pinned: bool = False, ttl_s: float | None = None) -> None:
        """Remember that a model should be live."""
        models = tuple(m for m in self._desired.models if m.id != model)
        unloaded = tuple(m for m in self._desired.unloaded if m != model)
        self._change(models=(*models, DesiredModel(model, path, added_at, pinned, ttl_s)), unloaded=unloaded)

    def forget(self, model: str) -> None:
        """Remember that a model should not be live, even if the configuration names it."""
        models = tuple(m for m in self._desired.models if m.id != model)
        unloaded = tuple(m for m in self._desired.unloaded if m != model)
        if model in self._config.models.auto_load:
            unloaded = (*unloaded, model)
        self._change(models=models, unloaded=unloaded)

    def evicted(self, model: str) -> None:
        """Remember that a model was unloaded for others. One that the configuration names comes back with a restart."""
        self._change(models=tuple(m for m in self._desired.models if m.id != model))

    def pardon(self, model: str) -> None:
        """Forget the panic strikes of a model."""
        strikes = without_model(self._desired.strikes, model)
        if strikes != self._desired.strikes:
            self._change(strikes=strikes)

    def resume(self, now: float) -> str:
        """Leave safe mode; return why it was on."""
        was = self.safe_mode
        self.safe_mode = ""
        self.starts = (now,)
        self._change(safe_mode="", strikes=())
        self._journal.write("safe_mode_left", reason=was)
        return was

    def _strike(self, model: str, now: float, words: str) -> None:
        reason = f"the machine panicked while it was being loaded: {words}"
        self._change(strikes=with_strike(self._desired.strikes, Strike(model, now, reason)))
        self._journal.write("panic_strike", level="ERROR", model=model, reason=words)

    def _change(self, **changes: object) -> None:
        self._desired = msgspec.structs.replace(self._desired, **changes)
        self._store.save_desired(self._desired)
