"""What is noted of a request, and how often the same refusal is: pure."""

from collections import Counter
from typing import Final

import msgspec
from starlette.types import Scope

from gateway.context import RequestContext
from protocol.audit import AuditRow, Status

_TIMEOUTS: Final = frozenset({"timeout", "request_timeout"})
#: Asked every few seconds by machines, and of nobody's interest afterwards.
QUIET: Final = frozenset({"/healthz", "/readyz", "/metrics"})
#: nginx's number for "the client went away".
CLIENT_GONE: Final = 499
_WINDOW_S: Final = 60.0
#: Of one client and error, and of all together, so many refusals a minute get rows of their own.
ROWS_EACH: Final = 20
ROWS_OF_ALL: Final = 300
#: Clients whose further refusals are counted apart; those of all others are counted together.
_COUNTED: Final = 256


def is_noted(method: str, route: str, status: int) -> bool:
    """Return whether a request belongs into the audit: what changes or costs something, and what was refused."""
    if route in QUIET or method == "OPTIONS":
        return False
    return method not in {"GET", "HEAD"} or status >= 400


def row_of(scope: Scope, context: RequestContext, *, route: str, status: int, now: float, took_s: float) -> AuditRow:
    """Return the row of a request that has ended `took_s` after its head had been read; `now` is Unix time."""
    access, worked = context.access, context.worked
    key = None
    if access is not None:
        key = access.key.id if access.key is not None else access.client if access.admin else None
    error = context.error_code or (worked.error if worked is not None else None)
    peer = scope.get("client")
    row = AuditRow(
        request_id=context.request_id,
        timestamp=now - took_s,
        endpoint=route,
        status=_status(error, status, left=worked is not None and worked.left),
        http_status=status,
        duration_ms=round(took_s * 1000, 1),
        key_id=key,
        client=context.client or (peer[0] if peer else None),
        client_id=context.client_id or None,
        priority=access.priority if access is not None else 0,
        error_type=error,
    )
    if worked is None:
        return row
    return msgspec.structs.replace(
        row,
        model=worked.model,
        backend_type="local" if worked.incarnation is not None else None,
        incarnation=worked.incarnation,
        stream=worked.stream,
        priority=worked.priority,
        ttft_ms=worked.ttft_ms,
        prompt_tokens=worked.prompt_tokens,
        completion_tokens=worked.completion_tokens,
        total_tokens=worked.prompt_tokens + worked.completion_tokens,
        cached_tokens=worked.cached_tokens,
    )


def _status(error: str | None, status: int, *, left: bool) -> Status:
    if error in _TIMEOUTS:
        return "timeout"
    if error is not None:
        return "error"
    if left or status == CLIENT_GONE:
        return "cancelled"
    return "error" if status >= 400 else "success"


class Refusals:
    """Keeps a flood of refusals from becoming a flood of rows: what is too much is counted, and becomes one row."""

    def __init__(self) -> None:
        self._ends = 0.0
        self._rows: Counter[tuple[str | None, str | None]] = Counter()
        self._held: dict[tuple[str | None, str | None], AuditRow] = {}

    @property
    def holds(self) -> bool:
        """Whether rows wait for `release`."""
        return bool(self._held)

    def take(self, row: AuditRow, now: float) -> list[AuditRow]:
        """Return what is to be written when `row` comes at a monotonic time."""
        if row.status not in {"error", "timeout"} or row.incarnation is not None:
            return [row]
        written = self.release() if now >= self._ends else []
        if now >= self._ends:
            self._rows.clear()
            self._ends = now + _WINDOW_S
        key = (row.client, row.error_type)
        if self._rows[key] < ROWS_EACH and self._rows.total() < ROWS_OF_ALL:
            self._rows[key] += 1
            return [*written, row]
        self._hold(key, row)
        return written

    def release(self) -> list[AuditRow]:
        """Return the rows that stand for what was held back."""
        rows = list(self._held.values())
        self._held.clear()
        return rows

    def _hold(self, key: tuple[str | None, str | None], row: AuditRow) -> None:
        if key not in self._held and len(self._held) >= _COUNTED:
            key = (None, row.error_type)
            row = msgspec.structs.replace(row, client=None, client_id=None, key_id=None)
        held = self._held.get(key)
        # The last one speaks for all.
        self._held[key] = row if held is None else msgspec.structs.replace(row, count=held.count + 1)
