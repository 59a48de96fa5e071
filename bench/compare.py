"""The comparison: all contenders in turns, on each workload, in several rounds whose order alternates."""

import contextlib
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import psutil
from msgspec import structs

from bench.contenders import Contender, ContenderFailedError, Measured
from bench.host import HostFailedError
from bench.workloads import Workload
from protocol import __version__

#: Share of the machine that others may take during a measurement before it is made once more.
_DISTURBED: Final = 0.10
#: Before a measurement the machine should be as idle as this for a moment; it is waited for, but not for long.
_QUIET_PERCENT: Final = 15.0
_QUIET_SAMPLE_S: Final = 0.2
_QUIET_SAMPLES: Final = 5
_WARM_UP: Final = (Workload("warm-up", 8, 16), Workload("warm-up alone", 1, 16))
_WARM_UP_VECTORS: Final = (Workload("warm-up", 8, 0, 2, prompt_words=100, kind="embeddings"),)


class Progress:
    """One line on stderr that says how far it is; on a terminal it is written over and over."""

    def __init__(self, steps: int, *, stream: Any = None, now: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._steps = max(1, steps)
        self._done = 0
        self._now = now
        self._began = now()
        self._live = self._stream.isatty()

    def say(self, text: str) -> None:
        """Show what is being done."""
        left = ""
        if self._done:
            seconds = (self._now() - self._began) / self._done * (self._steps - self._done)
            left = f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"
        bar = ("#" * (20 * self._done // self._steps)).ljust(20, ".")
        line = f"[{bar}] {self._done}/{self._steps}{left}: {text}"
        self._stream.write(f"\r\x1b[K{line[:118]}" if self._live else line + "\n")
        self._stream.flush()

    def step(self) -> None:
        """Count one measurement."""
        self._done += 1

    def end(self) -> None:
        """Leave the line."""
        if self._live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


class Comparison:
    """Measures contenders in turns. `one_at_a_time` keeps only the one in memory whose turn it is.

    `vectors`: their model makes vectors, and is warmed up with texts.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        *,
        rounds: int,
        one_at_a_time: bool = False,
        vectors: bool = False,
        say: Callable[[str], None],
    ) -> None:
        self._contenders = list(contenders)
        self._rounds = rounds
        self._one_at_a_time = one_at_a_time
        self._warm_up = _WARM_UP_VECTORS if vectors else _WARM_UP
        self._say = say

    def steps(self, workloads: Sequence[Workload]) -> int:
        """Return how many measurements there will be."""
        return self._rounds * sum(len(self._able(workload)) for workload in workloads)

    def run(self, workloads: Sequence[Workload], step: Callable[[], None]) -> list[dict[str, Any]]:
        """Return for each workload what was measured, by contender and round."""
        found: list[dict[str, Any]] = [{"workload": workload, "rounds": {}} for workload in workloads]
        try:
            for contender in [] if self._one_at_a_time else list(self._contenders):
                self._start(contender)
            for number in range(self._rounds):
                for workload, result in zip(workloads, found, strict=True):
                    for contender in self._turns(workload, number):
                        self._say(f"round {number + 1} of {self._rounds}, {workload.name}, {contender.name}")
                        measured = self._measure(contender, workload, number)
                        if measured is not None:
                            result["rounds"].setdefault(contender.name, []).append(measured)
                        step()
        finally:
            with contextlib.ExitStack() as everyone:  # also the others, if one does not let itself be ended
                for contender in reversed(self._contenders):
                    everyone.callback(contender.close)
        return found

    def _able(self, workload: Workload) -> list[Contender]:
        return [each for each in self._contenders if workload.kind == "chat" or each.embeds]

    def _turns(self, workload: Workload, number: int) -> Iterator[Contender]:
        able = self._able(workload)
        return iter(able if number % 2 == 0 else able[::-1])

    def _start(self, contender: Contender) -> bool:
        if contender.started:
            return True
        self._say(f"starting {contender.name}")
        try:
            contender.start()
            for workload in self._warm_up:
                contender.measure(workload)
        except (ContenderFailedError, HostFailedError, OSError) as error:
            self._drop(contender, error)
            return False
        return True

    def _measure(self, contender: Contender, workload: Workload, number: int) -> Measured | None:
        if not self._start(contender):
            return None
        try:
            measured = undisturbed(contender, workload, number)
        except (ContenderFailedError, HostFailedError, OSError) as error:
            self._drop(contender, error)
            return None
        if self._one_at_a_time:
            contender.close()
        return measured

    def _drop(self, contender: Contender, error: Exception) -> None:
        """Go on without one that fails: the others are worth the time."""
        sys.stderr.write(f"\nbench: without {contender.name} from here on: {error}\n")
        contender.close()
        if contender in self._contenders:
            self._contenders.remove(contender)


def undisturbed(contender: Contender, workload: Workload, number: int = 0) -> Measured:
    """Return the less disturbed of at most two measurements; the second only if others took much during the first.

    One with errors is never the one that is left out.
    Each asks prompts of its own, and every contender the same ones in round `number`.
    """
    any(psutil.cpu_percent(_QUIET_SAMPLE_S) < _QUIET_PERCENT for _ in range(_QUIET_SAMPLES))
    first = contender.measure(structs.replace(workload, variant=2 * number + 1))
    if first["others"] < _DISTURBED or first["errors"]:  # what fails would fail again, and take its time
        return first
    second = contender.measure(structs.replace(workload, variant=2 * number + 2))
    if second["errors"]:
        return second
    return min(first, second, key=lambda measured: float(measured["others"]))


def machine() -> str:
    """Return what it runs on, in words that name no machine."""
    memory = psutil.virtual_memory().total / 1024**3
    return f"{psutil.cpu_count()} cores {platform.machine()}, {memory:.0f} GiB, {platform.system()}"


def head() -> dict[str, Any]:
    """Return what every report begins with."""
    return {"schema": "lmx.bench/1", "version": __version__, "machine": machine()}
