"""What launchd makes of our job, held against what LMX needs.

The text is that of `launchctl print DOMAIN/LABEL`, of which Apple says that it is no interface: what is not found in
it is not complained about.
"""

import os
import re
import shutil
import subprocess
from typing import Final

from protocol.config import LifecycleConfig

LABEL: Final = "com.lmx.supervisor"
_EXIT_TIMEOUT: Final = re.compile(r"^\s{0,20}exit timeout = (\d{1,9})\b", re.MULTILINE)
_SPAWN_TYPE: Final = re.compile(r"^\s{0,20}spawn type = (\w{1,40})", re.MULTILINE)
_PRINT_S: Final = 5.0
#: Spawn types under which launchd does not hold CPU, IO and GPU back.
_UNHINDERED: Final = frozenset({"interactive", "app"})


def problems(printed: str, stop_s: float) -> list[str]:
    """Return what is wrong with the job, in words; `stop_s` is how long stopping may take."""
    found: list[str] = []
    timeout = _EXIT_TIMEOUT.search(printed)
    if timeout is not None and 0 < int(timeout[1]) < stop_s:
        found.append(
            f"launchd kills the supervisor {timeout[1]} s after asking it to stop, which may take {stop_s:.0f} s: "
            "set ExitTimeOut to 60 in the job's plist, or install it with deploy/install-launchd.sh"
        )
    spawn = _SPAWN_TYPE.search(printed)
    if spawn is not None and spawn[1].lower() not in _UNHINDERED:
        found.append(
            f'launchd runs the supervisor as "{spawn[1]}" and holds the GPU back: set ProcessType to Interactive in '
            "the job's plist"
        )
    return found


def printed_job() -> str:
    """Return what launchd says of our job, "" if there is none or no launchd. Takes up to 10 s."""
    launchctl = shutil.which("launchctl")
    if launchctl is None:
        return ""
    for domain in ("system", f"gui/{os.getuid()}"):
        try:
            done = subprocess.run(
                (launchctl, "print", f"{domain}/{LABEL}"), capture_output=True, timeout=_PRINT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return done.stdout.decode("utf-8", "replace")
    return ""


def stop_seconds(config: LifecycleConfig) -> float:
    """Return how long stopping may take: requests end, then workers of up to some GiB."""
    return config.drain_s + config.stop_min_s
