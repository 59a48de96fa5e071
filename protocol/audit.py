"""The audit file `audit.db`: who asked for what, when, and how it ended. Never what was said.

Gateways write it (`gateway.audit_store`); the command line and the admin routes read it. SQLite in WAL mode, so that
nobody waits for anybody. Columns are only ever appended, with defaults: an older writer can go on in a newer file.
"""

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote

import msgspec

#: "LMXA", in SQLite's header: tells our file from another's.
APPLICATION_ID: Final = 0x4C4D5841
SCHEMA_VERSION: Final = 1
#: Rows of one page, at most.
MAX_PAGE: Final = 1000
#: A query that looks through more than this takes is given up: it holds back the checkpoints of the writer.
QUERY_S: Final = 5.0
_BUSY_S: Final = 5.0
_STEPS_BETWEEN_LOOKS: Final = 20_000

Status = Literal["success", "error", "timeout", "cancelled"]
STATUSES: Final[tuple[str, ...]] = ("success", "error", "timeout", "cancelled")


class AuditUnreadableError(Exception):
    """The audit file cannot be read; the text says why and what to do."""


class AuditRow(msgspec.Struct, frozen=True):
    """One request, or `count` refused ones of the same kind. Times in Unix seconds, durations in milliseconds.

    What is not known is None: a refused request has no model and no tokens.
    """

    request_id: str
    #: When its headers had been read.
    timestamp: float
    #: The route, never the path that was asked for.
    endpoint: str
    status: Status
    http_status: int
    duration_ms: float
    ttft_ms: float | None = None
    model: str | None = None
    #: Where it was worked on, None if nowhere: "local" is a worker of this machine.
    backend_type: str | None = None
    #: The incarnation of the worker that had it last.
    incarnation: int | None = None
    #: The id of the key, never the key; "admin" is the admin key.
    key_id: str | None = None
    #: Whom limits count: a key or an address.
    client: str | None = None
    #: What the client calls itself (`X-Client-ID`); proves nothing.
    client_id: str | None = None
    priority: int = 0
    stream: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    cached_tokens: int | None = None
    #: The code of the error.
    error_type: str | None = None
    count: int = 1
    id: int = 0


#: As they stand in the file, `id` first.
COLUMNS: Final = ("id", *(name for name in AuditRow.__struct_fields__ if name != "id"))
_WRITTEN: Final = COLUMNS[1:]
_TYPES: Final = {
    "timestamp": "REAL NOT NULL",
    "duration_ms": "REAL NOT NULL",
    "ttft_ms": "REAL",
    "request_id": "TEXT NOT NULL",
    "endpoint": "TEXT NOT NULL",
    "status": "TEXT NOT NULL",
    "http_status": "INTEGER NOT NULL",
    "priority": "INTEGER NOT NULL DEFAULT 0",
    "stream": "INTEGER NOT NULL DEFAULT 0",
    "count": "INTEGER NOT NULL DEFAULT 1",
    **dict.fromkeys(("model", "backend_type", "key_id", "client", "client_id", "error_type"), "TEXT"),
    **dict.fromkeys(
        ("incarnation", "prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens"),
        "INTEGER",
    ),
}
#: What is indexed, and for which rows: those that have it, or are not like nearly all others. An index holds the row id
#: as well, so pages of one model, key, … come out of it in order.
_INDEXED: Final = {
    "timestamp": "",
    "model": "",
    "request_id": "",
    "client": "",
    "status": "status <> 'success'",
    "backend_type": "backend_type <> 'local'",
    "key_id": "key_id IS NOT NULL",
    "client_id": "client_id IS NOT NULL",
}
SCHEMA: Final = (
    "CREATE TABLE IF NOT EXISTS audit_logs (id INTEGER PRIMARY KEY AUTOINCREMENT, "
    + ", ".join(f"{name} {_TYPES[name]}" for name in _WRITTEN)
    + ")",
    *(
        f"CREATE INDEX IF NOT EXISTS audit_{name} ON audit_logs ({name}){f' WHERE {which}' if which else ''}"
        for name, which in _INDEXED.items()
    ),
)
INSERT: Final = f"INSERT INTO audit_logs ({', '.join(_WRITTEN)}) VALUES ({', '.join('?' * len(_WRITTEN))})"  # noqa: S608
_SELECT: Final = f"SELECT {', '.join(COLUMNS)} FROM audit_logs"  # noqa: S608 - both of constants


def values_of(row: AuditRow) -> tuple[Any, ...]:
    """Return what `INSERT` wants."""
    return tuple(getattr(row, name) for name in _WRITTEN)


def document(row: AuditRow) -> dict[str, Any]:
    """Return a row as people and programs are shown it: with its time in UTC as well."""
    fields: dict[str, Any] = {name: getattr(row, name) for name in COLUMNS}
    fields["time"] = utc(row.timestamp)
    return fields


def utc(at: float) -> str:
    """Return a Unix time as ISO 8601 with milliseconds."""
    whole = int(at // 1)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{int((at - whole) * 1000):03d}Z"


class Filter(msgspec.Struct, frozen=True):
    """Which rows are wanted; what is None does not matter. `since` and `until` are Unix times, the latter excluded."""

    model: str | None = None
    status: str | None = None
    #: The id of a key.
    key: str | None = None
    #: A key, an address, or what a client calls itself.
    client: str | None = None
    request_id: str | None = None
    error_type: str | None = None
    since: float | None = None
    until: float | None = None
    backend_type: str | None = None

    def where(self) -> tuple[list[str], list[Any]]:
        """Return conditions in SQL, and their values."""
        conditions: list[str] = []
        values: list[Any] = []
        for column, value in (
            ("model = ?", self.model),
            ("status = ?", self.status),
            ("key_id = ?", self.key),
            ("request_id = ?", self.request_id),
            ("error_type = ?", self.error_type),
            ("backend_type = ?", self.backend_type),
            ("timestamp >= ?", self.since),
            ("timestamp < ?", self.until),
        ):
            if value is not None:
                conditions.append(column)
                values.append(value)
        if self.status is not None and self.status != "success":
            conditions.append(_INDEXED["status"])  # says that the index of these will do
        if self.backend_type is not None and self.backend_type != "local":
            conditions.append(_INDEXED["backend_type"])
        if self.client is not None:
            conditions.append("(client = ? OR client_id = ?)")
            values += [self.client, self.client]
        return conditions, values


class AuditReader:
    """Reads one audit file while others write it. For one thread; use it as a context manager."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            msg = "there is none: nothing has been asked here yet, or audit.enabled is false"
            raise AuditUnreadableError(msg)
        self._ends = 0.0
        try:
            self._connection = sqlite3.connect(read_only(path), uri=True, timeout=_BUSY_S, isolation_level=None)
        except sqlite3.Error as error:
            raise self._unreadable(error) from None
        self._connection.set_progress_handler(self._is_late, _STEPS_BETWEEN_LOOKS)

    def __enter__(self) -> "AuditReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def page(
        self, wanted: Filter, *, limit: int, before: int | None = None, after: int | None = None
    ) -> list[AuditRow]:
        """Return at most `limit` rows: the newest with an id below `before`, or the oldest with one above `after`.

        With `after` they come oldest first. Raises `AuditUnreadableError`.
        """
        conditions, values = wanted.where()
        order = "DESC"
        if after is not None:
            conditions.append("id > ?")
            values.append(after)
            order = "ASC"
        elif before is not None:
            conditions.append("id < ?")
            values.append(before)
        where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
        query = f"{_SELECT}{where} ORDER BY id {order} LIMIT ?"
        self._ends = time.monotonic() + QUERY_S
        try:
            found = self._connection.execute(query, (*values, min(limit, MAX_PAGE))).fetchall()
            return [_row(each) for each in found]
        except (sqlite3.Error, msgspec.ValidationError) as error:
            raise self._unreadable(error) from None

    def pages(self, wanted: Filter, *, limit: int | None = None) -> Iterator[list[AuditRow]]:
        """Yield all rows that are wanted, oldest first, a page at a time, so that no writer waits long."""
        after, left = 0, limit
        while left is None or left > 0:
            rows = self.page(wanted, limit=MAX_PAGE if left is None else min(left, MAX_PAGE), after=after)
            if not rows:
                return
            yield rows
            after = rows[-1].id
            left = None if left is None else left - len(rows)

    def _is_late(self) -> bool:
        return time.monotonic() > self._ends

    @staticmethod
    def _unreadable(error: Exception) -> AuditUnreadableError:
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        if name == "SQLITE_INTERRUPT":
            return AuditUnreadableError("that takes too long to look through: ask for a shorter time")
        return AuditUnreadableError(f"{name}: is it an audit file of LMX, and whole?")


def read_only(path: Path) -> str:
    """Return the SQLite URI that opens a file without ever making or changing it."""
    return f"file:{quote(str(path))}?mode=ro"


def _row(found: tuple[Any, ...]) -> AuditRow:
    """Return a row; raise `msgspec.ValidationError` for values that no gateway wrote: SQLite stores anything."""
    return msgspec.convert(dict(zip(COLUMNS, found, strict=True)), AuditRow, strict=False)
