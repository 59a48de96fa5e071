"""What a killed supervisor left behind: its processes are adopted or ended, its files swept."""

import asyncio
import contextlib
import re
from collections.abc import Collection, Sequence
from typing import Final

from protocol.paths import Home
from supervisor.children import end_stranger
from supervisor.host import Host
from supervisor.platform.base import Platform
from supervisor.store import ChildRecord, Runtime
from supervisor.watching import Changes

_PIECE_S: Final = 0.2
_PER_INCARNATION = re.compile(r"\.(\d+)\.(?:sock|json)$")


def living(runtime: Runtime, platform: Platform) -> tuple[ChildRecord, ...]:
    """Return the recorded processes that still live: same boot, same pid, same start."""
    if runtime.boot_id != platform.boot_id():
        return ()
    return tuple(child for child in runtime.children if platform.process_started(child.pid) == child.started)


def stale(runtime: Runtime, platform: Platform) -> tuple[ChildRecord, ...]:
    """Return the recorded processes whose pid belongs to somebody else by now: these are never touched."""
    same_boot = runtime.boot_id == platform.boot_id()
    return tuple(
        child
        for child in runtime.children
        if (started := platform.process_started(child.pid)) is not None and not (same_boot and started == child.started)
    )


def leftovers(home: Home) -> dict[str, int]:
    """Return the per-incarnation files in the run folder, by name, with their incarnation."""
    found = {}
    for entry in home.run.iterdir():
        match = _PER_INCARNATION.search(entry.name)
        if match:
            found[entry.name] = int(match[1])
    return found


def unrecorded(before: Runtime, home: Home, platform: Platform) -> frozenset[int]:
    """Return the incarnations of which only files tell: started just before the supervisor died, or the record is lost.

    Their processes may live, and nothing else would keep a second one from being started beside them.
    """
    if before.last_clean_shutdown or (before.boot_id and before.boot_id != platform.boot_id()):
        return frozenset()
    return frozenset(leftovers(home).values()) - {child.incarnation for child in before.children}


async def adopt(host: Host, changes: Changes, expected: Sequence[ChildRecord], unknown: Collection[int]) -> None:
    """Wait until everyone expected has introduced itself, then end those that have not.

    `unknown` are incarnations that may or may not live; they are given the same time.
    """

    def missing() -> list[ChildRecord]:
        adopted = {managed.slot.pid for managed in host.slots.values()}
        if host.spare is not None and host.spare.child is not None:
            adopted.add(host.spare.child.pid)
        return [child for child in expected if child.pid not in adopted]

    def present() -> set[int]:
        there = {managed.slot.incarnation for managed in host.slots.values()}
        return there if host.spare is None else there | {host.spare.incarnation}

    # In pieces, of which each counts as what it was to be: a time in which we stood still is not theirs.
    left_s = host.config.lifecycle.adopt_s
    while left_s > 0:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(_PIECE_S, left_s)):
                await changes.wait_for(lambda: not missing() and set(unknown) <= present())
                break
        left_s -= _PIECE_S
    wanted = [child for child in missing() if host.platform.process_started(child.pid) == child.started]
    for child in wanted:
        host.journal.write("orphan_ended", level="WARNING", model=child.model, slot=child.slot, pid=child.pid)
    grace = host.config.lifecycle.stop_min_s
    await asyncio.gather(*(end_stranger(host.platform, c.pid, c.started, grace_s=grace) for c in wanted))


def sweep(host: Host) -> None:
    """Remove files of incarnations that do not live. Paths are never reused, so a leftover only takes up space."""
    current = {managed.slot.incarnation for managed in host.slots.values() if managed.child is not None}
    for name, incarnation in leftovers(host.home).items():
        if incarnation not in current:
            with contextlib.suppress(OSError):
                (host.home.run / name).unlink()
