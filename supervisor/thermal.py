"""How hot the machine is, as `macmon` tells it. Optional: whatever goes wrong is unknown, and nothing waits for it.

macmon (https://github.com/vladkens/macmon, `macmon pipe -i MS`) prints one JSON object per line. Versions up to 0.7
give the GPU as `gpu_usage: [MHz, share]`; later ones name `gpu_freq_mhz` and `gpu_active_ratio` as well.
"""

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable
from subprocess import DEVNULL, PIPE
from typing import Any, Final

import msgspec

from protocol.config import ThermalConfig
from supervisor.guard import Guard
from supervisor.journal import Journal

#: launchd gives its jobs a short PATH; Homebrew and MacPorts install here.
_PLACES: Final = ("/opt/homebrew/bin", "/usr/local/bin", "/opt/local/bin")
_MAX_LINE: Final = 65536
#: After macmon was missing, wrong or silent it is tried again, each time later.
_RETRY_S: Final = 60.0
_MAX_RETRY_S: Final = 3600.0
_END_S: Final = 2.0
#: No clock, temperature or power is as much.
_MOST: Final = 1e6


class Reading(msgspec.Struct, frozen=True):
    """One sample: MHz, share of the time that the GPU was busy, degrees Celsius, watts; None is unknown."""

    gpu_freq_mhz: float | None = None
    gpu_usage: float | None = None
    gpu_temp_c: float | None = None
    gpu_power_w: float | None = None
    cpu_power_w: float | None = None

    def throttled(self, config: ThermalConfig) -> bool:
        """Return whether the GPU is slow though it has work; an idle one is slow because it may be."""
        known = self.gpu_freq_mhz is not None and self.gpu_usage is not None
        return known and (self.gpu_freq_mhz or 0) < config.throttled_mhz and (self.gpu_usage or 0) > config.busy


def parse(line: bytes) -> Reading | None:
    """Return what a line of macmon says, None if it says nothing that is understood."""
    try:
        sample = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(sample, dict):
        return None
    usage = sample.get("gpu_usage")
    pair = usage if isinstance(usage, list) and len(usage) == 2 else [None, None]
    temperatures = sample.get("temp")
    reading = Reading(
        gpu_freq_mhz=_number(sample.get("gpu_freq_mhz", pair[0])),
        gpu_usage=_number(sample.get("gpu_active_ratio", pair[1])),
        gpu_temp_c=_number(temperatures.get("gpu_temp_avg")) if isinstance(temperatures, dict) else None,
        gpu_power_w=_number(sample.get("gpu_power")),
        cpu_power_w=_number(sample.get("cpu_power")),
    )
    return reading if reading != Reading() else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < _MOST else None


def find_macmon(name: str) -> str | None:
    """Return where the program is, None if it is not there."""
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", os.defpath), *_PLACES)))


class Thermometer:
    """Keeps one `macmon pipe` running, and what it last said. A sample that is overdue means that it hangs."""

    def __init__(self, config: ThermalConfig, journal: Journal, guard: Guard, changed: Callable[[], None]) -> None:
        self._config = config
        self._journal = journal
        self._guard = guard
        self._changed = changed
        self._reading: Reading | None = None
        self._throttled = False
        #: What the journal says, which samples that do not come change nothing about.
        self._told_throttled = False

    @property
    def throttled(self) -> bool:
        """Whether the GPU was held back in the last sample."""
        return self._throttled

    def document(self) -> dict[str, Any]:
        """Return the last sample for `status`: `status` is "unknown", "nominal" or "throttled"."""
        known = self._reading is not None
        status = "unknown" if not known else "throttled" if self._throttled else "nominal"
        return {"status": status, **msgspec.to_builtins(self._reading or Reading())}

    async def run(self) -> None:
        """Measure until cancelled."""
        if not self._config.macmon:
            return
        pause = _RETRY_S
        while True:
            heard = False
            with self._guard("thermal"):
                heard = await self._listen()
            self._note(None)
            pause = _RETRY_S if heard else min(2 * pause, _MAX_RETRY_S)
            await asyncio.sleep(pause)

    async def _listen(self) -> bool:
        """Read samples until there are none; return whether there was one."""
        program = find_macmon(self._config.macmon)
        if program is None:
            return False
        interval_s = self._config.interval_s
        arguments = ("pipe", "-i", str(round(1000 * interval_s)))
        try:
            process = await asyncio.create_subprocess_exec(
                program, *arguments, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, limit=_MAX_LINE
            )
        except OSError:
            return False
        heard = False
        try:
            while (reading := await self._sample(process, interval_s + self._config.timeout_s)) is not None:
                heard = True
                self._note(reading)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _END_S)
        return heard

    async def _sample(self, process: asyncio.subprocess.Process, within_s: float) -> Reading | None:
        if process.stdout is None:
            return None
        try:
            return parse(await asyncio.wait_for(process.stdout.readline(), within_s))
        except (TimeoutError, ValueError):  # it hangs; a line without an end
            return None

    def _note(self, reading: Reading | None) -> None:
        before = self._throttled
        self._reading, self._throttled = reading, reading is not None and reading.throttled(self._config)
        if self._throttled and not self._told_throttled and reading is not None:
            self._told_throttled = True
            self._journal.write(
                "thermal_throttled",
                level="WARNING",
                gpu_freq_mhz=reading.gpu_freq_mhz,
                gpu_usage=reading.gpu_usage,
                gpu_temp_c=reading.gpu_temp_c,
            )
        elif self._told_throttled and not self._throttled and reading is not None:
            self._told_throttled = False
            self._journal.write("thermal_nominal", gpu_freq_mhz=reading.gpu_freq_mhz, gpu_temp_c=reading.gpu_temp_c)
        if before != self._throttled:
            self._changed()
