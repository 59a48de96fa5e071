"""What the supervisor says once a second about everything: its status document, as far as health and metrics use it."""

import time
from typing import Final

import msgspec

from protocol.logs import event

#: Older than this it says nothing about now: the supervisor is away.
FRESH_S: Final = 10.0


class ExitVitals(msgspec.Struct, frozen=True):
    """How a process ended."""

    kind: str = msgspec.field(name="class", default="")
    signal: str | None = None
    at: float = 0.0


class ModelVitals(msgspec.Struct, frozen=True):
    """One loaded model. Sizes are bytes; None is unknown."""

    id: str
    state: str = ""
    pid: int | None = None
    restarts: int = 0
    last_exit: ExitVitals | None = None
    reason: str | None = None
    memory_bytes: int | None = None
    limit_bytes: int | None = None
    need_bytes: int | None = None
    active_bytes: int | None = None
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    running: int | None = None
    waiting: int | None = None
    concurrent_limit: int | None = None
    degraded: bool = False
    heartbeat_late: bool = False
    closed: bool = False


class MemoryVitals(msgspec.Struct, frozen=True):
    """The machine's memory, and what of it is ours."""

    total_bytes: int | None = None
    available_bytes: int | None = None
    used_bytes: int | None = None
    limit_bytes: int | None = None
    free_bytes: int | None = None
    reserve_bytes: int | None = None
    machine_used_share: float | None = None
    shed_share: float = 0.95
    pressure: str | None = None
    shedding: bool = False
    monitored: bool = True


class SupervisorVitals(msgspec.Struct, frozen=True):
    """The supervisor itself."""

    pid: int = 0
    uptime_s: float = 0.0
    version: str = ""
    state_durable: bool = True
    state_problem: str | None = None
    safe_mode: str | None = None
    host_breaker_open_s: float | None = None
    internal_errors: int = 0


class GatewayVitals(msgspec.Struct, frozen=True):
    """What the supervisor sees of the gateway."""

    restarts: int = 0
    memory_bytes: int | None = None


class ThermalVitals(msgspec.Struct, frozen=True):
    """The GPU's temperature and clock, where they can be measured."""

    status: str = "unknown"
    gpu_freq_mhz: float | None = None
    gpu_temp_c: float | None = None


class Count(msgspec.Struct, frozen=True):
    """How often something has happened since the supervisor began."""

    name: str
    model: str = ""
    kind: str = ""
    value: int = 0


class Vitals(msgspec.Struct, frozen=True):
    """The document. Everything has a default: another version may know less."""

    supervisor: SupervisorVitals = SupervisorVitals()
    gateway: GatewayVitals | None = None
    memory: MemoryVitals = MemoryVitals()
    models: tuple[ModelVitals, ...] = ()
    thermal: ThermalVitals | None = None
    counters: tuple[Count, ...] = ()

    @property
    def memory_percent(self) -> float | None:
        """The share of the machine's memory that is in use, in percent with one decimal."""
        share = self.memory.machine_used_share
        return None if share is None else round(100 * share, 1)


class VitalsView:
    """Holds the newest. Owned by the gateway's event loop."""

    def __init__(self) -> None:
        self._decoder: msgspec.json.Decoder[Vitals] = msgspec.json.Decoder(Vitals)
        self._last: Vitals | None = None
        self._at = 0.0

    def take(self, document: bytes) -> None:
        """Take over what the supervisor says."""
        try:
            self._last, self._at = self._decoder.decode(document), time.monotonic()
        except msgspec.MsgspecError as error:
            event("vitals_unreadable", level="WARNING", why=type(error).__name__)

    @property
    def last(self) -> Vitals | None:
        """The newest, however old."""
        return self._last

    @property
    def age_s(self) -> float | None:
        """How old that is, None if there is none."""
        return None if self._last is None else time.monotonic() - self._at

    @property
    def fresh(self) -> Vitals | None:
        """The newest if it is of now, else None."""
        age = self.age_s
        return self._last if age is not None and age <= FRESH_S else None
