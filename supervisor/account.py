"""What the ledger notes of one slot and its present process."""

from dataclasses import dataclass, field

from supervisor.enforcement import Watch
from supervisor.prediction import Prediction


@dataclass(eq=False)
class Account:
    """Times are monotonic seconds, sizes bytes."""

    #: None until the folder was read. `need` is that of the present process, which does not change while it lives.
    prediction: Prediction | None = None
    pinned: bool = False
    #: None takes the configured one.
    ttl_s: float | None = None
    used_at: float = 0.0
    #: The process that the rest is about.
    incarnation: int = 0
    served: int = 0
    busy: bool = False
    watch: Watch = field(default_factory=Watch)
    peak: int = 0
    #: Once it was ready and idle: what it occupied, and how much of that MLX knew of.
    settled: int = 0
    settled_mlx: int = 0
    ready_since: float | None = None
    told_at: float = 0.0
    told_slots: int = 0
    #: Its speed as a share of what it was here before; None until it was timed.
    pace: float | None = None
    replaced_at: float | None = None
    #: It does not fit: its next process waits, in words that stand in `Managed.blocked`.
    short: bool = False
    #: It is being unloaded, and for what.
    leaving: str = ""

    @property
    def need(self) -> int:
        """What is reserved for it, 0 if that is not known."""
        return 0 if self.prediction is None else self.prediction.need

    def begin(self, incarnation: int, now: float) -> None:
        """Another process: nothing of the last one counts."""
        self.incarnation = incarnation
        self.served = self.peak = self.settled = self.settled_mlx = 0
        self.watch, self.busy, self.ready_since, self.told_at = Watch(), False, None, 0.0
        self.told_slots = 0
        self.pace = None
        self.used_at = now
