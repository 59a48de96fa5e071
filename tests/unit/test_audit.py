"""The audit: what is noted of a request, how a flood is kept small, and a file that never stops anybody."""

import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.audit import RECENT, Audit, Listener, told
from gateway.audit_file import DELETED_AT_ONCE, AuditFile, ForeignFileError, is_bad
from gateway.audit_rows import ROWS_EACH, ROWS_OF_ALL, Refusals, is_noted, row_of
from gateway.audit_store import QUEUE_ROWS, AuditStore
from gateway.auth import Access
from gateway.context import RequestContext, Worked
from protocol.audit import MAX_PAGE, AuditReader, AuditRow, AuditUnreadableError, Filter
from protocol.config import AuditConfig
from protocol.errors import LmxError
from protocol.keys import KeyRecord

DAY = 86_400.0
NOW = 1_800_000_000.0


def row(number: int = 0, **fields: Any) -> AuditRow:
    known: dict[str, Any] = {
        "request_id": f"r{number}", "timestamp": NOW + number, "endpoint": "/v1/chat/completions", "status": "success",
        "http_status": 200, "duration_ms": 12.5,
    }  # fmt: skip
    return AuditRow(**{**known, **fields})


def fill(path: Path, rows: list[AuditRow]) -> None:
    file = AuditFile(path)
    file.append(rows)
    file.close()


def written(path: Path, wanted: Filter | None = None) -> list[AuditRow]:
    with AuditReader(path) as reader:
        return [each for page in reader.pages(wanted or Filter()) for each in page]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.db"


# -- what is noted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "route", "status", "noted"),
    [
        ("POST", "/v1/chat/completions", 200, True),
        ("GET", "/v1/models", 200, False),
        ("GET", "/v1/models", 401, True),
        ("GET", "/healthz", 200, False),
        ("GET", "/readyz", 503, False),
        ("GET", "/metrics", 200, False),
        ("OPTIONS", "/v1/chat/completions", 200, False),
        ("DELETE", "/admin/x", 200, True),
        ("", "/ws/audit-logs", 101, True),
    ],
)
def test_what_costs_or_changes_something_and_what_was_refused_is_noted(
    method: str, route: str, status: int, noted: bool
) -> None:
    assert is_noted(method, route, status) is noted


def noted(context: RequestContext, status: int = 200) -> AuditRow:
    scope = {"method": "POST", "client": ("192.0.2.1", 5)}
    return row_of(scope, context, route="/v1/chat/completions", status=status, now=NOW, took_s=2.0)


def test_a_row_says_who_asked_what_of_whom_and_how_it_went() -> None:
    key = KeyRecord("ab12", "bot", "d" * 64, NOW, priority=5)
    worked = Worked("alpha", stream=True, priority=5, incarnation=7, ttft_ms=80.0, prompt_tokens=9, completion_tokens=4)
    context = RequestContext("r1", 0.0, None, access=Access("key:ab12", key), client_id="mailer", worked=worked)
    found = noted(context)
    assert (found.key_id, found.client, found.client_id, found.priority) == ("ab12", "key:ab12", "mailer", 5)
    assert (found.model, found.backend_type, found.incarnation, found.stream) == ("alpha", "local", 7, True)
    assert (found.prompt_tokens, found.completion_tokens, found.total_tokens) == (9, 4, 13)
    assert (found.status, found.duration_ms, found.ttft_ms, found.timestamp) == ("success", 2000.0, 80.0, NOW - 2)


@pytest.mark.parametrize(
    ("error", "left", "status", "expected"),
    [
        (None, False, 200, ("success", None)),
        (None, True, 200, ("cancelled", None)),
        (None, False, 499, ("cancelled", None)),
        ("timeout", False, 504, ("timeout", "timeout")),
        ("worker_crashed", False, 200, ("error", "worker_crashed")),
        ("invalid_json", False, 400, ("error", "invalid_json")),
    ],
)
def test_how_a_request_ended(error: str | None, left: bool, status: int, expected: tuple[str, str | None]) -> None:
    context = RequestContext("r1", 0.0, None, worked=Worked("alpha", stream=False, error=error, left=left))
    found = noted(context, status)
    assert (found.status, found.error_type) == expected


def test_a_flood_of_refusals_becomes_few_rows_and_none_is_forgotten() -> None:
    refusals = Refusals()
    rows: list[AuditRow] = []
    sent = 50_000
    for number in range(sent):
        client = f"10.0.{number % 1000 // 256}.{number % 256}"
        rows += refusals.take(row(number, status="error", http_status=401, error_type="invalid_api_key", client=client),
                              now=number / sent * 59)  # fmt: skip
    assert len(rows) == ROWS_OF_ALL
    rows += refusals.release()
    assert len(rows) < 2 * ROWS_OF_ALL
    assert sum(each.count for each in rows) == sent
    assert refusals.release() == []


def test_one_client_that_floods_takes_no_room_from_others_and_a_minute_later_all_is_new() -> None:
    refusals = Refusals()

    def refused(client: str, now: float) -> list[AuditRow]:
        return refusals.take(row(status="error", error_type="rate_limit_exceeded", client=client), now)

    assert sum(len(refused("loud", 1.0)) for _ in range(100)) == ROWS_EACH
    assert len(refused("quiet", 2.0)) == 1
    later = refused("loud", 62.0)
    assert [each.count for each in later] == [100 - ROWS_EACH, 1]


def test_what_a_model_worked_on_is_never_held_back() -> None:
    refusals = Refusals()
    failed = row(status="error", error_type="worker_crashed", incarnation=3, client="bot")
    assert all(refusals.take(failed, 0.0) == [failed] for _ in range(1000))
    assert all(len(refusals.take(row(client="bot"), 0.0)) == 1 for _ in range(1000))


# -- the file -----------------------------------------------------------------------------------------------------


def test_the_file_is_private_and_indexed(path: Path) -> None:
    path.touch(0o644)
    fill(path, [row()])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with sqlite3.connect(path) as connection:
        indexed = {
            connection.execute(f"PRAGMA index_info({name})").fetchone()[2]
            for _, name, *_ in connection.execute("PRAGMA index_list(audit_logs)")
        }
        mode = connection.execute("PRAGMA journal_mode").fetchone()
        for wanted in (
            Filter(model="a"),
            Filter(status="error"),
            Filter(key="k"),
            Filter(request_id="r"),
            Filter(client="c"),
            Filter(backend_type="openai"),
        ):
            conditions, values = wanted.where()
            query = f"EXPLAIN QUERY PLAN SELECT * FROM audit_logs WHERE {' AND '.join(conditions)} ORDER BY id DESC"
            plan = " ".join(str(step[3]) for step in connection.execute(query, values))
            assert "USING INDEX audit_" in plan, (wanted, plan)
    connection.close()
    assert indexed == {"timestamp", "model", "status", "backend_type", "request_id", "key_id", "client", "client_id"}
    assert mode == ("wal",)


def test_rows_come_back_by_every_filter_and_a_page_at_a_time(path: Path) -> None:
    fill(
        path,
        [
            row(1, model="alpha", key_id="k1", client="key:k1", backend_type="local"),
            row(2, model="beta", client="10.0.0.1", client_id="mailer", backend_type="openai"),
            row(3, status="error", error_type="invalid_json", client="mailer"),
            *(row(number, model="alpha", status="cancelled") for number in range(4, 2504)),
        ],
    )

    def ids(**wanted: Any) -> list[str]:
        return [each.request_id for each in written(path, Filter(**wanted))]

    assert ids(key="k1") == ["r1"]
    assert ids(client="mailer") == ["r2", "r3"]
    assert ids(model="beta", status="success") == ["r2"]
    assert ids(error_type="invalid_json") == ["r3"]
    assert ids(request_id="r2") == ["r2"]
    assert [ids(backend_type=name) for name in ("local", "openai", "anthropic")] == [["r1"], ["r2"], []]
    assert ids(since=NOW + 2, until=NOW + 4) == ["r2", "r3"]
    assert len(ids(model="alpha")) == 2501
    with AuditReader(path) as reader:
        newest = reader.page(Filter(), limit=5)
        assert [each.request_id for each in newest] == ["r2503", "r2502", "r2501", "r2500", "r2499"]
        assert [each.request_id for each in reader.page(Filter(), limit=2, before=newest[-1].id)] == ["r2498", "r2497"]
        assert len(reader.page(Filter(), limit=10**6)) == MAX_PAGE
        assert reader.page(Filter(model="' OR 1=1 --"), limit=5) == []
    assert newest[0].stream is False


def test_what_is_older_than_the_retention_goes_and_nothing_else(path: Path) -> None:
    file = AuditFile(path)
    file.append([row(1, timestamp=NOW - 31 * DAY), row(2, timestamp=NOW - 29 * DAY), row(3, timestamp=NOW)])
    assert file.tidy(NOW - 30 * DAY, 0) is False
    assert [each.request_id for each in written(path)] == ["r2", "r3"]
    file.close()


def test_deletion_is_bounded_and_the_number_of_rows_too(path: Path) -> None:
    file = AuditFile(path)
    file.append([row(number) for number in range(2 * DELETED_AT_ONCE + 100)])
    assert file.tidy(0, 100) is True
    assert len(written(path)) == DELETED_AT_ONCE + 100
    assert file.tidy(0, 100) is True
    assert file.tidy(0, 100) is False
    assert [each.request_id for each in written(path)] == [f"r{2 * DELETED_AT_ONCE + n}" for n in range(100)]
    file.close()


@pytest.fixture
def started() -> Iterator[list[AuditStore]]:
    stores: list[AuditStore] = []
    yield stores
    for store in stores:
        store.close(5)


def until(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def new_store(path: Path, started: list[AuditStore], **config: Any) -> AuditStore:
    store = AuditStore(path, AuditConfig(**config), clock=lambda: NOW)
    started.append(store)
    store.start()
    return store


def spoil(path: Path, how: str) -> None:
    if how == "garbage":
        path.write_bytes(os.urandom(8192))
    elif how == "foreign":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE notes (text)")
        connection.close()
    elif how == "link":
        target = path.with_name("elsewhere")
        target.write_bytes(b"mine")
        path.symlink_to(target)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "columns":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE audit_logs (id INTEGER PRIMARY KEY, timestamp REAL)")
            connection.execute("PRAGMA application_id = 0x4C4D5841")
        connection.close()
    else:  # torn in the middle
        fill(path, [row(number) for number in range(2000)])
        data = path.read_bytes()
        path.write_bytes(data[:4096] + os.urandom(len(data) - 4096))


@pytest.mark.parametrize("how", ["garbage", "foreign", "link", "pipe", "folder", "columns", "torn"])
def test_a_file_that_will_not_do_is_kept_aside_and_a_new_one_made(
    path: Path, how: str, started: list[AuditStore]
) -> None:
    spoil(path, how)
    store = new_store(path, started)
    store.put(row(7))
    until(lambda: store.written == 1)
    assert [each.request_id for each in written(path)] == ["r7"]
    assert len([file for file in path.parent.glob("audit.db.bad-*") if not file.name.endswith("-wal")]) == 1
    assert (path.with_name("elsewhere").read_bytes() == b"mine") if how == "link" else True


def test_a_locked_file_costs_nobody_anything_and_its_rows_come_later(path: Path, started: list[AuditStore]) -> None:
    store = new_store(path, started)
    store.put(row(0))
    until(lambda: store.written == 1)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    for number in range(1, 1001):
        store.put(row(number))
    assert store.written == 1, "nobody waited for the file"
    other.execute("COMMIT")
    other.close()
    until(lambda: store.written == 1001)
    assert store.dropped == 0


def test_what_is_too_much_is_dropped_and_counted(path: Path) -> None:
    store = AuditStore(path, AuditConfig())  # nobody writes
    for number in range(QUEUE_ROWS + 25):
        store.put(row(number))
    assert (store.waiting, store.dropped) == (QUEUE_ROWS, 25)


def test_a_disk_that_takes_nothing_drops_nothing_while_there_is_room(
    path: Path, started: list[AuditStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = threading.Event()
    full.set()
    append = AuditFile.append

    def disk(self: AuditFile, rows: Any) -> None:
        if full.is_set():
            raise OSError(28, "No space left on device")
        append(self, rows)

    monkeypatch.setattr(AuditFile, "append", disk)
    store = new_store(path, started)
    store.put(row(1))
    until(lambda: store.problem)
    assert store.problem == "No space left on device"
    full.clear()
    until(lambda: store.written == 1)
    assert (store.problem, [each.request_id for each in written(path)]) == ("", ["r1"])


def test_a_file_that_somebody_removed_is_made_again(path: Path, started: list[AuditStore]) -> None:
    store = new_store(path, started)
    store.put(row(1))
    until(lambda: store.written == 1)
    path.unlink()
    store.put(row(2))
    until(lambda: store.written == 2)
    assert [each.request_id for each in written(path)] == ["r2"]


def test_two_gateways_write_one_file(path: Path, started: list[AuditStore]) -> None:
    stores = [new_store(path, started) for _ in range(2)]
    for number in range(600):
        stores[number % 2].put(row(number))
    until(lambda: sum(store.written for store in stores) == 600)
    assert len({each.request_id for each in written(path)}) == 600


def test_what_waits_is_written_at_the_end(path: Path) -> None:
    store = AuditStore(path, AuditConfig())
    store.start()
    store.put(row(1))
    store.close(10)
    assert len(written(path)) == 1


def test_errors_that_pass_do_not_cost_the_file() -> None:
    busy = sqlite3.OperationalError("database is locked")
    busy.sqlite_errorname = "SQLITE_BUSY"
    assert not is_bad(busy)
    assert not is_bad(OSError(28, "full"))
    assert is_bad(ForeignFileError("x"))


def test_a_missing_or_foreign_file_is_said_in_words(path: Path) -> None:
    with pytest.raises(AuditUnreadableError, match="there is none"):
        AuditReader(path)
    spoil(path, "garbage")
    with AuditReader(path) as reader, pytest.raises(AuditUnreadableError, match="SQLITE_NOTADB"):
        reader.page(Filter(), limit=1)


# -- those who listen ---------------------------------------------------------------------------------------------


def one_more(audit: Audit, number: int) -> None:
    context = RequestContext(f"r{number}", 0.0, None, worked=Worked("alpha", stream=False, incarnation=1))
    audit.note({"method": "POST"}, context, route="/v1/chat/completions", status=200, took_s=0.1)


async def told_of(listener: Listener) -> list[str]:
    return [each.request_id for each in await listener.next(5)]


async def test_who_listens_is_told_the_last_hundred_and_then_each() -> None:
    audit = Audit(None)
    for number in range(120):
        one_more(audit, number)
    listener = await audit.listen()
    assert await told_of(listener) == [f"r{number}" for number in range(20, 120)]
    one_more(audit, 500)
    assert await told_of(listener) == ["r500"]
    assert await listener.next(0.01) == []
    assert b'"id"' not in told(row())


async def test_who_does_not_keep_up_is_dropped_and_others_are_not() -> None:
    audit = Audit(None)
    slow, quick = await audit.listen(), await audit.listen()
    heard = 0
    for number in range(3000):
        one_more(audit, number)
        if number % 500 == 0:
            heard += len(await told_of(quick))
    heard += len(await told_of(quick))
    assert (slow.dropped, await slow.next(1), quick.dropped, heard) == (True, [], False, 3000)


async def test_listeners_are_bounded() -> None:
    audit = Audit(None)
    listeners = [await audit.listen() for _ in range(32)]
    with pytest.raises(LmxError, match="listen"):
        await audit.listen()
    audit.leave(listeners[0])
    await audit.listen()


async def test_a_new_gateway_tells_what_earlier_ones_wrote(path: Path) -> None:
    fill(path, [row(number) for number in range(150)])
    audit = Audit(AuditStore(path, AuditConfig(), clock=lambda: NOW))
    audit.start()
    one_more(audit, 900)
    rows = await told_of(await audit.listen())  # at once: the file has not been read yet
    assert (len(rows), rows[0], rows[-1]) == (RECENT, "r51", "r900")
    audit.close(5)


async def test_what_was_written_while_the_last_rows_were_read_is_told_once(path: Path) -> None:
    fill(path, [row(number) for number in range(3)])
    audit = Audit(AuditStore(path, AuditConfig(), clock=lambda: NOW))
    audit._recent.append(row(2))
    audit.start()
    assert await told_of(await audit.listen()) == ["r0", "r1", "r2"]
    audit.close(5)
