"""Progress of a load on stderr: a bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from protocol import control
from supervisor.screen import size


@contextmanager
def show_progress() -> Iterator[Callable[[control.Progress], None]]:
    """Yield a function that shows one report; what it drew is gone or complete afterwards."""
    if not sys.stderr.isatty():
        yield _Lines().show
        return
    from rich.console import Console  # noqa: PLC0415 - a third of the start-up time of the command line
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def show(report: control.Progress) -> None:
            words = f"{report.id} {report.state.value}" + (f" ({report.note})" if report.note else "")
            bar.update(task, description=words, completed=report.done_bytes, total=report.total_bytes or None)

        yield show


class _Lines:
    """Prints a line for each new state and each tenth of the bytes."""

    def __init__(self) -> None:
        self._last = ""

    def show(self, report: control.Progress) -> None:
        """Print the report if it says something new."""
        tenth = 10 * report.done_bytes // report.total_bytes if report.total_bytes else 0
        line = f"{report.id}: {report.state.value}" + (f" ({report.note})" if report.note else "")
        key = f"{line} {tenth}"
        if key != self._last:
            self._last = key
            amount = f" {size(report.done_bytes)} of {size(report.total_bytes)}" if report.total_bytes else ""
            click.echo(line + amount, err=True)
