"""What is noted of one living process, to be read when it ends."""

import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from supervisor.output import start_of, tail_of

MAX_SAMPLES: Final = 60


@dataclass(eq=False)
class BlackBox:
    """Make it just before the process is started."""

    #: The file that its stdout and stderr are appended to, and where this process's part of it begins.
    output: Path
    begins: int = 0
    #: Monotonic and Unix time of its start, or of its adoption.
    since: float = field(default_factory=time.monotonic)
    since_unix: float = field(default_factory=time.time)
    samples: deque[tuple[float, int | None]] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))

    def __post_init__(self) -> None:
        self.begins = start_of(self.output)

    def weigh(self, now: float, used: int | None) -> None:
        """Note the memory it occupies at a monotonic time, None if it could not be measured."""
        self.samples.append((now, used))

    def tail(self) -> str:
        """Return the end of what it wrote, as it wrote it: to be compared with what is known, never to be shown."""
        return tail_of(self.output, self.begins)

    def memory(self, now: float) -> tuple[tuple[float, int | None], ...]:
        """Return the last samples with their age in seconds."""
        return tuple((round(max(0.0, now - at), 3), used) for at, used in self.samples)
