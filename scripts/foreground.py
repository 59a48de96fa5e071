"""Runs a program so that Ctrl-C reaches it alone: `foreground.py PROGRAM [ARG…]`, exit status of PROGRAM.

A terminal sends SIGINT to its whole foreground process group. In `make run` that includes make, which then
reports an interrupt and fails even when the program stopped cleanly and exited 0. So the program gets a
process group of its own, which is the terminal's foreground group for as long as it lives.
Without a terminal, or in the background (`make run &`), nothing is changed.
"""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn


def main(argv: list[str]) -> NoReturn:
    if not argv:
        sys.exit("usage: foreground.py PROGRAM [ARG…]")
    terminal = _our_terminal()
    if terminal is None:
        os.execvp(argv[0], argv)

    ours = os.getpgrp()
    # Only the foreground group may hand the terminal over; afterwards we are not in it any more.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # none may fall between fork and the handlers
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.tcsetpgrp(terminal, os.getpid())
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        # A stopped program would leave a terminal that nobody owns: make waits for its end only.
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        try:
            os.execvp(argv[0], argv)
        except OSError as error:
            print(f"{argv[0]}: {error.strerror}", file=sys.stderr)
            os._exit(127)

    def pass_on(number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for number in signals:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    _, status = os.waitpid(child, 0)
    with suppress(OSError):  # the terminal may be closed by now
        os.tcsetpgrp(terminal, ours)
    code = os.waitstatus_to_exitcode(status)
    sys.exit(code if code >= 0 else 128 - code)


def _our_terminal() -> int | None:
    """A descriptor of the controlling terminal if we are its foreground group."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
        if os.tcgetpgrp(terminal) == os.getpgrp():
            return terminal
        os.close(terminal)
    except OSError:
        pass
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
