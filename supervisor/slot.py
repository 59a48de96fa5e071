"""What is known of one supervised process: plain values, all times monotonic seconds."""

from typing import Final

import msgspec

from protocol.config import LifecycleConfig
from protocol.states import ModelState, Phase
from supervisor.exits import ExitRecord
from supervisor.restarts import History, RestartPolicy

_ALIVE: Final = frozenset(
    {
        ModelState.STARTING,
        ModelState.LOADING,
        ModelState.WARMING,
        ModelState.READY,
        ModelState.DRAINING,
        ModelState.STOPPING,
    }
)
_WAITING: Final = frozenset({ModelState.STARTING, ModelState.BACKOFF})
COMING_UP: Final = frozenset({ModelState.STARTING, ModelState.LOADING, ModelState.WARMING})


class Settings(msgspec.Struct, frozen=True):
    """What `advance` needs to know besides the slot."""

    config: LifecycleConfig
    policy: RestartPolicy


class Slot(msgspec.Struct, frozen=True):
    """Everything that is known of one supervised process. Times are monotonic seconds."""

    state: ModelState = ModelState.STOPPED
    wanted: bool = False
    incarnation: int = 0
    #: Of the current process; 0 while there is none.
    pid: int = 0
    since: float = 0.0
    retry_at: float = 0.0
    restarts: int = 0
    history: History = History()
    last_exit: ExitRecord | None = None
    #: Why it is in quarantine, or waits.
    reason: str = ""
    weight_bytes: int = 0
    done_bytes: int = 0
    total_bytes: int = 0
    moved_at: float = 0.0
    load_s: float = 0.0
    ready_at: float | None = None
    beat_at: float = 0.0
    late: bool = False
    phase: Phase = Phase.IDLE
    step: int = 0
    step_at: float = 0.0
    #: We ended it for lack of progress; its exit is a hang whatever its status says.
    condemned: str = ""
    terminated: bool = False
    killed: bool = False
    #: Memory of the process when it was last seen, and when it last fell while stopping.
    footprint: int = 0
    fell_at: float = 0.0
    #: The present (or last) process runs with less: see `next_degraded`.
    degraded: bool = False
    #: In quarantine: when it is tried again by itself, 0 never; and how many such tries there were.
    probe_at: float = 0.0
    probes: int = 0
    #: This try came out of quarantine by itself: one failure puts it back.
    probing: bool = False

    @property
    def alive(self) -> bool:
        """Whether a process exists or is being started."""
        return self.pid != 0 and self.state in _ALIVE

    @property
    def waiting(self) -> bool:
        """Whether it waits for its turn or its time to be started."""
        return self.wanted and self.pid == 0 and self.state in _WAITING

    def next_degraded(self, config: LifecycleConfig) -> bool:
        """Whether the next process should run degraded: a late try of a series, or its last end asks for it."""
        failures = len(self.history.failed_at)
        asks = self.last_exit is not None and self.last_exit.degrade and failures > 0
        return self.probing or asks or failures + 1 >= config.degraded_from_try

    @property
    def coming_up(self) -> bool:
        """Whether it occupies the host's one place for loading."""
        return self.pid != 0 and self.state in COMING_UP
