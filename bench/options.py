"""What the programs of the bench have in common: their options, and how they end when they are told to."""

import argparse
import signal
import sys
from types import FrameType
from typing import Final

_ENDS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def at_least_one(text: str) -> int:
    """Return a whole number from 1 on. Raises `argparse.ArgumentTypeError` for anything else."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return number


def numbers(text: str) -> list[int]:
    """Return whole numbers from 1 on, with commas between them, each once."""
    return list(dict.fromkeys(at_least_one(one) for one in text.split(",")))


def end_cleanly() -> None:
    """Have Ctrl-C, SIGTERM and a closed terminal end the program by `SystemExit`, so that nothing is left running.

    Only the first of them counts: what ends the other processes then must not be cut short by the second.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        for each in _ENDS:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for each in _ENDS:
        signal.signal(each, end)
