"""What the supervisor remembers over its own death: what should be live (desired) and what was (runtime)."""

from typing import Annotated, Any, Final, Protocol

import msgspec

from protocol.logs import Field, event
from protocol.paths import Home
from protocol.statefile import StateFile
from supervisor.platform.base import Platform
from supervisor.safety import Strike

_SCHEMA: Final = 1
_MAX_STARTS: Final = 16
#: What the system takes for a pid, and what can be written down again: a damaged number must not get any further.
Pid = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
Number = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class DesiredModel(msgspec.Struct, frozen=True):
    """A model that should be live. `added_at` is Unix time in seconds."""

    id: str
    path: str
    added_at: float
    #: Never unloaded to make room; and after how long without a request, None as configured, 0 never.
    pinned: bool = False
    ttl_s: float | None = None


class Desired(msgspec.Struct, frozen=True):
    """Operator intent. `unloaded` keeps configured models down that an operator unloaded."""

    models: tuple[DesiredModel, ...] = ()
    unloaded: tuple[str, ...] = ()
    #: Kernel panics while a model was being loaded.
    strikes: tuple[Strike, ...] = ()
    #: Why nothing is restored until `resume`; empty in ordinary times.
    safe_mode: str = ""


class ChildRecord(msgspec.Struct, frozen=True):
    """A process as it was last seen; `started` and the boot id tell it from a stranger with its pid."""

    slot: str
    model: str
    incarnation: Number
    pid: Pid
    started: float


class Runtime(msgspec.Struct, frozen=True):
    """How the last supervisor left things."""

    pid: Number = 0
    boot_id: str = ""
    started_at: float = 0.0
    starts: tuple[float, ...] = ()
    incarnation: Number = 0
    children: tuple[ChildRecord, ...] = ()
    loaded_models: tuple[str, ...] = ()
    last_clean_shutdown: bool = False
    shutdown_reason: str = ""
    #: The model that was being loaded. Written before the load begins.
    load_mark: str = ""
    #: The supervisor gave way to its next image on purpose; the gateway is to follow.
    handover: bool = False
    saved_at: float = 0.0
    #: The last status document, for `status` while no supervisor runs.
    snapshot: dict[str, Any] | None = None


class Say(Protocol):
    """Writes an event: `protocol.logs.event`, or the journal's `write`."""

    def __call__(self, name: str, /, *, level: str = ..., **fields: Field) -> None:
        """Write an event with its fields."""


class Store:
    """Both state files. A disk that refuses them is reported once and does not stop the service.

    `say` writes what was lost or recovered, by default into the log.
    """

    def __init__(self, home: Home, platform: Platform, say: Say = event) -> None:
        sync = platform.full_sync
        self._desired = StateFile(home.state / "desired", kind="lmx.desired", schema=_SCHEMA, sync=sync, shape=Desired)
        self._runtime = StateFile(home.state / "runtime", kind="lmx.runtime", schema=_SCHEMA, sync=sync, shape=Runtime)
        self._say = say
        #: Files that do not hold what they were last told: why not, and what that was.
        self._problems: dict[StateFile, tuple[str, msgspec.Struct]] = {}

    @property
    def durable(self) -> bool:
        """Whether both files hold what they were last told."""
        return not self._problems

    @property
    def problem(self) -> str:
        """Why not, in words; empty while durable."""
        return next((why for why, _ in self._problems.values()), "")

    def load(self) -> tuple[Desired | None, Runtime]:
        """Return what was stored; None for the intent if there is none that can be used."""
        desired: Desired | None = _load(self._desired, "desired", self._say)
        runtime: Runtime | None = _load(self._runtime, "runtime", self._say)
        return desired, runtime or Runtime()

    def save_desired(self, desired: Desired) -> None:
        """Store the intent."""
        self._save(self._desired, desired)

    def save_runtime(self, runtime: Runtime) -> None:
        """Store how things are."""
        self._save(self._runtime, runtime)

    def try_again(self) -> None:
        """Save what could not be saved; nothing while everything is durable."""
        for file, (_, payload) in list(self._problems.items()):
            self._save(file, payload)

    def _save(self, file: StateFile, payload: msgspec.Struct) -> None:
        try:
            file.save(payload)
        except OSError as error:
            was_durable = self.durable
            self._problems[file] = (error.strerror or str(error), payload)
            if was_durable:
                event("state_not_durable", level="ERROR", reason=self.problem)
        else:
            # One file that is saved says nothing about the other.
            if self._problems.pop(file, None) is not None and self.durable:
                event("state_durable_again")


def remember_start(starts: tuple[float, ...], now: float) -> tuple[float, ...]:
    """Return the recent start times with this one, newest last."""
    return (*starts, now)[-_MAX_STARTS:]


def _load(file: StateFile, name: str, event: Say) -> Any:
    """Return the newest payload that can be used, None if there is none; say loudly what was wrong on the way."""
    loaded = file.load()
    for problem in loaded.problems:
        event("state_recovered", level="ERROR", file=name, reason=problem)
    if loaded.problems and loaded.payload is None:
        event("runtime_state_load_failed", level="ERROR", file=name, reason="no copy of it can be used")
    return loaded.payload
