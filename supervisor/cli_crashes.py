"""`lmx-supervisor crashes`: what is kept of past crashes. Reads the folder itself: no supervisor has to run."""

import json
import sys
import time
from typing import Final

import click

from protocol.paths import Home
from protocol.states import CliExit
from supervisor.crashes import CrashRecord, CrashStore, UnknownCrashError, document
from supervisor.screen import duration, size

_HEADINGS: Final = ("CRASH", "MODEL", "CLASS", "HOW", "PHASE", "UP", "AGE")
#: Samples and requests a person wants to see; --json has them all.
_SHOWN: Final = 10


def show_crashes(home: Home, crash: str | None, *, as_json: bool) -> None:
    """Print the list of crashes, or the one whose id is, or begins with, `crash`; exit 1 if there is none such."""
    store = CrashStore(home.crashes)
    try:
        if as_json:
            click.echo(json.dumps(document(store, crash or ""), indent=2))
        elif crash is None:
            click.echo(crashes_text(store.records(), time.time()))
        else:
            record = store.read(crash)
            click.echo(crash_text(record, store.stacks(record), time.time()))
    except UnknownCrashError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(CliExit.FAILED)


def crashes_text(records: list[CrashRecord], now: float) -> str:
    """Return the list of crashes for a person."""
    if not records:
        return "no crashes"
    rows = [_HEADINGS, *(_row(record, now) for record in records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(record: CrashRecord, now: float) -> tuple[str, ...]:
    return (
        record.id,
        record.model or "gateway",
        record.kind,
        record.signal or ("-" if record.code is None else f"exit {record.code}"),
        record.phase or "-",
        duration(record.uptime_s),
        duration(max(0.0, now - record.at)),
    )


def crash_text(record: CrashRecord, stacks: str, now: float) -> str:
    """Return one crash for a person."""
    memory = ", ".join(f"{size(used)} {age:.0f} s before" for age, used in record.memory[-_SHOWN:]) or "unknown"
    requests = ", ".join(record.requests[:_SHOWN]) or "none"
    more = f" and {len(record.requests) - _SHOWN} more" if len(record.requests) > _SHOWN else ""
    lines = [
        f"crash     {record.id}, {duration(max(0.0, now - record.at))} ago",
        f"model     {record.model or 'gateway'}{' (degraded)' if record.degraded else ''}",
        f"process   pid {record.pid}, incarnation {record.incarnation}, up {duration(record.uptime_s)}",
        f"class     {record.kind}: {record.words}",
        *([f"hint      {record.hint}"] if record.hint else []),
        f"phase     {record.phase or 'unknown'}, step {record.step}",
        f"memory    {memory}",
        f"requests  {requests}{more}",
        f"versions  {', '.join(f'{name} {version}' for name, version in record.versions.items()) or 'unknown'}",
        "",
        "output (what is not known to be harmless is blanked):",
        *(f"  {line}" for line in record.stderr_tail.splitlines() or ["nothing"]),
    ]
    if stacks:
        lines += ["", "stacks:", *(f"  {line}" for line in stacks.splitlines())]
    return "\n".join(lines)
