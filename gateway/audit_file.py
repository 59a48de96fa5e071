"""`audit.db` as the gateway writes it: opened with suspicion, filled in batches, kept within its bounds.

Nothing in here knows of threads or queues; every method may raise `sqlite3.Error` or `OSError`.
"""

import contextlib
import os
import sqlite3
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from protocol.audit import APPLICATION_ID, INSERT, SCHEMA, SCHEMA_VERSION, AuditRow, values_of
from protocol.logs import event

#: Rows that one deletion takes: some milliseconds, after which rows that wait are written.
DELETED_AT_ONCE: Final = 2_000
#: The other gateway of a hand-over, or a reader that checkpoints, is waited for so long.
_BUSY_S: Final = 5.0
#: The write-ahead log is cut back to this after a checkpoint.
_WAL_BYTES: Final = 16 * 1024 * 1024
#: Files that were put aside, the newest; each may be as large as the audit itself.
_KEPT_ASIDE: Final = 3
_BAD_NAMES: Final = frozenset({"SQLITE_CORRUPT", "SQLITE_NOTADB"})


class ForeignFileError(sqlite3.DatabaseError):
    """What lies there is whole, but not ours."""


class AuditFile:
    """The file, opened at the first need, and again when somebody has put another in its place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None

    def append(self, rows: Sequence[AuditRow]) -> None:
        """Write rows, all or none."""
        with self._transaction() as connection:
            connection.executemany(INSERT, [values_of(row) for row in rows])

    def tidy(self, before: float, max_rows: int) -> bool:
        """Delete some rows from before a Unix time, and some beyond `max_rows` (0: no bound); return if more are left.

        Ids are given in order, so the number of rows is known without counting them.
        """
        chosen = "SELECT id FROM audit_logs WHERE timestamp < ? LIMIT ?"
        with self._transaction() as connection:
            deleted = connection.execute(
                f"DELETE FROM audit_logs WHERE id IN ({chosen})",  # noqa: S608 - of constants
                (before, DELETED_AT_ONCE),
            ).rowcount
            if max_rows and deleted < DELETED_AT_ONCE:
                oldest = (
                    "SELECT id FROM audit_logs WHERE id <= (SELECT MAX(id) FROM audit_logs) - ? ORDER BY id LIMIT ?"
                )
                deleted += connection.execute(
                    f"DELETE FROM audit_logs WHERE id IN ({oldest})",  # noqa: S608 - of constants
                    (max_rows, DELETED_AT_ONCE - deleted),
                ).rowcount
        return deleted >= DELETED_AT_ONCE

    def close(self) -> None:
        """Let go of the file."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def put_aside(self) -> None:
        """Rename the file, and its log, which must never be replayed into the next one: the log first."""
        self.close()
        aside = self._path.with_name(f"{self._path.name}.bad-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
        with contextlib.suppress(FileNotFoundError):
            self._beside("-wal").replace(f"{aside}-wal")
        self._beside("-shm").unlink(missing_ok=True)
        self._path.replace(aside)
        older = sorted(self._path.parent.glob(f"{self._path.name}.bad-*Z"))[:-_KEPT_ASIDE]
        for file in older:
            if file.is_file():
                file.unlink(missing_ok=True)
                file.with_name(f"{file.name}-wal").unlink(missing_ok=True)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        connection = self._opened()
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise

    def _opened(self) -> sqlite3.Connection:
        if self._connection is not None and self._identity != _identity(self._path):
            event("audit_file_replaced", level="WARNING")
            self.close()
        if self._connection is None:
            self._make_private()
            connection = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None)
            try:
                _prepare(connection)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
            self._identity = _identity(self._path)
        return self._connection

    def _make_private(self) -> None:
        """Make the file if there is none, and see that it is one: a pipe would hold us up for ever, a link lead away.

        An existing file is not opened here: to close it again would drop the locks of other connections to it.
        """
        try:
            status = self._path.lstat()
        except FileNotFoundError:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            with contextlib.suppress(FileExistsError):  # the other gateway was faster
                os.close(os.open(self._path, flags, 0o600))
            return
        if not stat.S_ISREG(status.st_mode):
            raise ForeignFileError("not a file")
        if status.st_mode & 0o077:
            self._path.chmod(0o600)

    def _beside(self, ending: str) -> Path:
        return self._path.with_name(self._path.name + ending)


def is_bad(error: Exception) -> bool:
    """Return whether an error says that the file will never do, rather than that it does not do now."""
    if isinstance(error, ForeignFileError):
        return True
    name = getattr(error, "sqlite_errorname", "")
    return name.startswith(tuple(_BAD_NAMES)) or (
        isinstance(error, sqlite3.OperationalError) and name == "SQLITE_ERROR"
    )


def _prepare(connection: sqlite3.Connection) -> None:
    """Make the file ours, if it is empty; raise `ForeignFileError` if it is somebody else's."""
    connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
    # Rows survive the end of this process, not a power cut of the last moments: no sync for each batch.
    connection.execute("PRAGMA synchronous = NORMAL")
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    tables = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
    if tables and application != APPLICATION_ID:
        raise ForeignFileError("another program's")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("BEGIN IMMEDIATE")
    for statement in SCHEMA:
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    # Of a newer version only columns that have defaults are unknown here.
    connection.execute(f"PRAGMA user_version = {max(version, SCHEMA_VERSION)}")
    connection.execute("COMMIT")
    connection.execute("SELECT MAX(id) FROM audit_logs").fetchone()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
