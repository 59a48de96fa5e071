"""What can happen to a slot, and what the lifecycle may ask the daemon to do about it."""

from enum import Enum, auto

import msgspec

from protocol.states import Phase
from supervisor.exits import ExitRecord


class Want(msgspec.Struct, frozen=True):
    """It should be live. Clears a quarantine."""


class Unwant(msgspec.Struct, frozen=True):
    """It should not be live any more; `force` cuts what runs."""

    force: bool = False


class Restart(msgspec.Struct, frozen=True):
    """Replace the process by a new one; `force` cuts what runs."""

    force: bool = False


class Reset(msgspec.Struct, frozen=True):
    """Forget every failure; what is set aside is started again."""


class SetAside(msgspec.Struct, frozen=True):
    """It must not be started by itself, for a reason that lies outside of its processes."""

    reason: str


class Started(msgspec.Struct, frozen=True):
    """A process was spawned."""

    pid: int
    incarnation: int
    degraded: bool = False


class Adopted(msgspec.Struct, frozen=True):
    """A process of an earlier supervisor introduced itself."""

    pid: int
    incarnation: int
    phase: Phase


class Helloed(msgspec.Struct, frozen=True):
    """The process connected and said who it is."""


class Moved(msgspec.Struct, frozen=True):
    """Weights were read."""

    done_bytes: int
    total_bytes: int


class BecameReady(msgspec.Struct, frozen=True):
    """The canary passed."""

    load_s: float


class Beat(msgspec.Struct, frozen=True):
    """A heartbeat."""

    phase: Phase
    step: int


class Condemned(msgspec.Struct, frozen=True):
    """Somebody else saw that the process must not go on."""

    reason: str


class Weighed(msgspec.Struct, frozen=True):
    """The memory of the process was measured, in bytes."""

    footprint: int


class HasDrained(msgspec.Struct, frozen=True):
    """No request is left in the process."""


class Exited(msgspec.Struct, frozen=True):
    """The process is gone. `luck` in [-1, 1] spreads the restart delay."""

    record: ExitRecord
    luck: float = 0.0


class Reclassified(msgspec.Struct, frozen=True):
    """A report that came later explains the last end better: `record` takes the place of `was`."""

    was: ExitRecord
    record: ExitRecord


class SpawnFailed(msgspec.Struct, frozen=True):
    """The system refused to start a process."""

    record: ExitRecord
    luck: float = 0.0


class Tick(msgspec.Struct, frozen=True):
    """Time has passed; `late_s` is how much later than planned the supervisor woke."""

    late_s: float = 0.0


Event = (
    Want
    | Unwant
    | Restart
    | Reset
    | SetAside
    | Started
    | Adopted
    | Helloed
    | Moved
    | BecameReady
    | Beat
    | Condemned
    | Weighed
    | HasDrained
    | Exited
    | Reclassified
    | SpawnFailed
    | Tick
)


class Action(Enum):
    """What the daemon has to do to the process."""

    ASK_DRAIN = auto()
    ASK_STOP = auto()
    DUMP_STACKS = auto()
    TERMINATE = auto()
    KILL = auto()
