"""Looking at memory: what fails is unknown, and said once."""

from typing import Any

from supervisor.footprint import Meter
from supervisor.guard import Guard
from supervisor.ledger import Machine


class Failing:
    """A platform of which every answer is a bug, until it is mended."""

    broken = True

    def __getattr__(self, name: str) -> Any:
        def answer(*_: object) -> int:
            if self.broken:
                raise RuntimeError(name)
            return 7

        return answer


def test_an_adapter_that_raises_knows_nothing_and_is_told_of_once() -> None:
    guard, platform = Guard(), Failing()
    meter = Meter(platform, guard)  # type: ignore[arg-type]
    for _ in range(3):
        assert meter.process(1) is None
        assert meter.process(2) is None
        assert meter.machine() == Machine(None, None, None)
        assert meter.pressure() is None
    assert guard.count == 6
    platform.broken = False
    assert meter.process(1) == 7
    platform.broken = True
    assert meter.process(1) is None
    assert guard.count == 7, "again after it had worked"
