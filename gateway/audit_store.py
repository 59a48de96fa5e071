"""The one thread that writes the audit: rows go in at once and never wait, whatever the disk does."""

import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from gateway.audit_file import AuditFile, is_bad
from protocol.audit import AuditRow
from protocol.config import AuditConfig
from protocol.logs import event, exception_event

#: Rows that wait while the file cannot be written: some megabytes. One more is dropped and counted.
QUEUE_ROWS: Final = 10_000
#: Written with one transaction.
_BATCH_ROWS: Final = 1_000
#: Rows are gathered for so long: a wake-up of this thread for each would cost the streams more than the writing.
_GATHER_S: Final = 0.25
#: Between two looks for rows that are too old.
_TIDY_S: Final = 60.0
_TIDY_AGAIN_S: Final = 0.2
#: After a failure, doubled up to the second.
_RETRY_S: Final = (0.5, 30.0)
#: How often the same trouble is logged.
_COMPLAIN_S: Final = 60.0
_DAY_S: Final = 86_400


class AuditStore:
    """Takes rows from the event loop. `clock` is `time.time`; `start` and `close` belong to the life of the process."""

    def __init__(self, path: Path, config: AuditConfig, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._file = AuditFile(path)
        self._config = config
        self._clock = clock
        self._queue: deque[AuditRow] = deque()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._retry_s = _RETRY_S[0]
        self._complained_at = 0.0
        self._reported = 0
        self._tidied_at = float("-inf")
        #: Rows that are in the file, and that are lost.
        self.written = 0
        self.dropped = 0
        #: Why nothing can be written now, "" if it can.
        self.problem = ""
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)

    def start(self) -> None:
        """Begin to write. If the system gives no thread, nothing is written, and everything else goes on."""
        try:
            self._thread.start()
        except RuntimeError as error:
            self.problem = "the system gives no thread"
            exception_event("audit_failed", error)

    def put(self, row: AuditRow) -> None:
        """Have a row written soon, or drop and count it if too many wait."""
        if len(self._queue) >= QUEUE_ROWS:
            self.dropped += 1
            return
        self._queue.append(row)
        if not self._wake.is_set():
            self._wake.set()

    def write_now(self) -> bool:
        """Write what waits in this thread, before `start` or instead of it; return whether all is written."""
        while self._queue and self._write_batch():
            pass
        return not self._queue

    @property
    def waiting(self) -> int:
        """Rows that are not in the file yet, roughly."""
        return len(self._queue)

    def close(self, within_s: float) -> None:
        """Write what waits, for at most so long."""
        self._closing.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(within_s)

    # -- in the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = 0.0
        while not self._closing.is_set():
            self._wake.wait(pause)
            self._closing.wait(_GATHER_S)
            self._wake.clear()
            pause = self._turn()
        self._turn()
        self._file.close()

    def _turn(self) -> float:
        """Write all that waits and tidy up a little; return the seconds until there is something to do of itself."""
        try:
            while self._queue and self._write_batch():
                pass
            self._complain()
            return self._tidy() if not self._queue else 0.0
        except Exception as error:  # noqa: BLE001 - the boundary of this thread: it must outlive whatever this was
            exception_event("audit_failed", error)
            self._closing.wait(_RETRY_S[1])
            return 0.0

    def _write_batch(self) -> bool:
        """Write the oldest rows; return whether that worked. Meanwhile they stay in the queue."""
        batch = [self._queue[index] for index in range(min(len(self._queue), _BATCH_ROWS))]
        for attempt in range(2):
            try:
                self._file.append(batch)
            except (sqlite3.Error, OSError) as error:
                if not self._replaced(error) or attempt:
                    self._failed(error)
                    return False
            else:
                break
        for _ in batch:
            self._queue.popleft()
        self.written += len(batch)
        if self.problem:
            self.problem = ""
            event("audit_recovered", level="WARNING", dropped=self.dropped)
        self._retry_s = _RETRY_S[0]
        return True

    def _replaced(self, error: Exception) -> bool:
        """Put a file aside that will never do; return whether that worked."""
        if not is_bad(error):
            return False
        try:
            self._file.put_aside()
        except OSError:
            return False
        event("audit_file_set_aside", level="ERROR", reason=_reason(error))
        return True

    def _failed(self, error: Exception) -> None:
        self._file.close()
        reason = _reason(error)
        if reason != self.problem:
            self.problem = reason
            event("audit_not_written", level="ERROR", reason=reason, waiting=len(self._queue))
        self._closing.wait(self._retry_s)
        self._retry_s = min(2 * self._retry_s, _RETRY_S[1])

    def _complain(self) -> None:
        now = time.monotonic()
        if self.dropped > self._reported and now - self._complained_at >= _COMPLAIN_S:
            event("audit_dropped", level="ERROR", rows=self.dropped - self._reported, problem=self.problem)
            self._reported, self._complained_at = self.dropped, now

    def _tidy(self) -> float:
        left = self._tidied_at + _TIDY_S - time.monotonic()
        if left > 0 or self.problem or self._closing.is_set():
            return max(left, _TIDY_AGAIN_S)
        try:
            more = self._file.tidy(self._clock() - self._config.retention_days * _DAY_S, self._config.max_rows)
        except (sqlite3.Error, OSError) as error:
            if not self._replaced(error):
                self._failed(error)
            more = False
        if more:
            return _TIDY_AGAIN_S
        self._tidied_at = time.monotonic()
        return _TIDY_S


def _reason(error: Exception) -> str:
    """Return what went wrong in a word: SQLite's own texts may quote what is in a file."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return getattr(error, "sqlite_errorname", type(error).__name__)
