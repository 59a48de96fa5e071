"""Whether a model generates as fast as it used to on this machine.

macOS holds the GPU back for processes that it takes for background work, and says so nowhere; 0.12 of the speed was
reported. Each load of a model ends with a few timed steps, and the best of earlier loads is what they are held against.
"""

from typing import Final, NamedTuple

from supervisor.journal import Journal
from supervisor.managed import Managed
from supervisor.prediction import UNREADABLE, History, key_of

#: Below this share of the speed that the model had here before, the operator is told.
SLOW: Final = 0.5
#: So much slower the baseline becomes with each load: a change for good is the new baseline after a dozen loads.
_FADE: Final = 1.05


class Pace(NamedTuple):
    """`share` of the baseline's speed, 1.0 without one; `baseline_s` per step for the next time."""

    share: float
    baseline_s: float

    @property
    def slow(self) -> bool:
        """Whether the operator should know."""
        return self.share < SLOW


def judge(step_s: float, baseline_s: float) -> Pace:
    """Hold the seconds per step of a load against the best of earlier loads; 0 is unknown, in both."""
    if step_s <= 0:
        return Pace(1.0, baseline_s)
    if baseline_s <= 0:
        return Pace(1.0, step_s)
    return Pace(baseline_s / step_s, min(step_s, baseline_s * _FADE))


class PaceKeeper:
    """Judges each process once, when it has become ready, and tells operators of a slow one."""

    def __init__(self, journal: Journal, history: History, module: str) -> None:
        self._journal = journal
        self._history = history
        self._module = module

    def look(self, managed: Managed) -> None:
        """Judge a model that is ready, unless that has been done."""
        account, capabilities = managed.account, managed.capabilities
        prediction = account.prediction
        if account.pace is not None or capabilities is None or prediction is None or prediction is UNREADABLE:
            return
        key = key_of(managed.path, prediction.weight_bytes, self._module)
        before = self._history.pace_of(key)
        pace = judge(capabilities.step_s, before)
        account.pace = pace.share
        if pace.baseline_s != before:
            self._history.learn_pace(key, pace.baseline_s)
        if pace.slow:
            self._journal.write(
                "gpu_throttled",
                level="WARNING",
                model=managed.model,
                share=round(pace.share, 2),
                step_ms=round(1000 * capabilities.step_s, 2),
                usual_ms=round(1000 * before, 2),
            )
