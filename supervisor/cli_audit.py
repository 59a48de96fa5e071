"""`lmx-supervisor audit`: shows and exports the record of requests. Reads the file itself: nothing has to run."""

import csv
import datetime as dt
import io
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, Final, NoReturn

import click

from protocol.audit import COLUMNS, MAX_PAGE, STATUSES, AuditReader, AuditRow, AuditUnreadableError, Filter, document
from protocol.paths import Home
from protocol.states import CliExit

AUDIT_SCHEMA: Final = "lmx.audit/1"
_DURATION: Final = re.compile(r"([1-9][0-9]{0,5})([smhdw])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SHOWN: Final = 50
_HEADINGS: Final = ("TIME", "REQUEST", "CLIENT", "ENDPOINT", "MODEL", "STATUS", "MS", "TTFT", "TOKENS", "ERROR")
_EXPORTED: Final = ("time", *COLUMNS)
#: What a spreadsheet takes for a formula.
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n")


class Moment(click.ParamType[float]):
    """A moment in the past, as Unix time."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read `24h` (so long ago) or `2027-01-31` or `2027-01-31T12:00`, in UTC unless it says otherwise."""
        if isinstance(value, float):
            return value
        found = _DURATION.fullmatch(value)
        if found is not None:
            return time.time() - int(found[1]) * _SECONDS[found[2]]
        try:
            moment = dt.datetime.fromisoformat(value)
            return (moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).timestamp()
        except (ValueError, OverflowError):
            self.fail("write it as 24h (s, m, h, d, w: so long ago) or as a date, 2027-01-31", param, ctx)


@click.command()
@click.option("--model", help="Of this model.")
@click.option("--status", type=click.Choice(STATUSES), help="That ended so.")
@click.option("--key", help="Sent with the key of this id; 'admin' is the admin key.")
@click.option("--client", help="Of this client: key:ID, an address, or an X-Client-ID.")
@click.option("--request-id", help="With this id.")
@click.option("--error", "error_type", help="That ended with this error code.")
@click.option("--backend", "backend_type", help="That were worked on there: 'local' is a worker of this machine.")
@click.option("--since", type=Moment(), help="Not before: 24h (so long ago) or 2027-01-31 (UTC).")
@click.option("--until", type=Moment(), help="Before.")
@click.option("--limit", type=click.IntRange(1), help=f"At most so many [{_SHOWN}; with --export all].")
@click.option("--export", type=click.Choice(["jsonl", "csv"]), help="Print all of it, oldest first, for programs.")
@click.option("--json", "as_json", is_flag=True, help="Print the document lmx.audit/1.")
@click.pass_obj
def audit(home: Home, /, limit: int | None, export: str | None, as_json: bool, **wanted: Any) -> None:
    """Show the last requests: who asked for what, when, how it ended; never what was said."""
    chosen = Filter(**wanted)
    try:
        with AuditReader(home.audit) as reader:
            if export is not None:
                _export(export, reader, chosen, limit)
                return
            rows = _newest(reader, chosen, limit or _SHOWN)
    except AuditUnreadableError as error:
        _fail(f"{home.audit} cannot be read: {error}")
    except BrokenPipeError:
        sys.exit(CliExit.OK)
    if as_json:
        click.echo(json.dumps({"schema": AUDIT_SCHEMA, "rows": [document(row) for row in rows]}, indent=2))
    else:
        click.echo(audit_text(rows))


def audit_text(rows: list[AuditRow]) -> str:
    """Return the table, oldest at the top, as a log has it."""
    if not rows:
        return "There are no such requests."
    table = [_HEADINGS, *(_cells(row) for row in reversed(rows))]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)


def csv_text(rows: Iterable[AuditRow]) -> str:
    """Return lines of CSV without a heading; no cell of text is a formula to a spreadsheet."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in rows:
        fields = document(row)
        writer.writerow([_harmless(fields[name]) for name in _EXPORTED])
    return out.getvalue()


def _newest(reader: AuditReader, wanted: Filter, limit: int) -> list[AuditRow]:
    rows: list[AuditRow] = []
    before: int | None = None
    while len(rows) < limit:
        page = reader.page(wanted, limit=min(limit - len(rows), MAX_PAGE), before=before)
        if not page:
            break
        rows += page
        before = page[-1].id
    return rows


def _export(how: str, reader: AuditReader, wanted: Filter, limit: int | None) -> None:
    if how == "csv":
        click.echo(",".join(_EXPORTED))
    for text in _parts(how, reader, wanted, limit):
        click.echo(text, nl=False)


def _parts(how: str, reader: AuditReader, wanted: Filter, limit: int | None) -> Iterator[str]:
    for rows in reader.pages(wanted, limit=limit):
        if how == "csv":
            yield csv_text(rows)
        else:
            yield "".join(json.dumps(document(row)) + "\n" for row in rows)


def _cells(row: AuditRow) -> tuple[str, ...]:
    tokens = "" if row.total_tokens is None else f"{row.prompt_tokens}+{row.completion_tokens}"
    error = f"{row.error_type or ''}{f' ×{row.count}' if row.count > 1 else ''}"
    ttft = "" if row.ttft_ms is None else f"{row.ttft_ms:.0f}"
    return tuple(
        _shown(text)
        for text in (
            document(row)["time"],
            row.request_id,
            f"{row.client or ''}{f' ({row.client_id})' if row.client_id else ''}",
            row.endpoint,
            f"{row.model}#{row.incarnation}" if row.model and row.incarnation is not None else row.model or "",
            row.status,
            f"{row.duration_ms:.0f}",
            ttft,
            tokens,
            error,
        )
    )


def _shown(text: str) -> str:
    """Return a text without what would move the cursor: the file may have been somebody else's."""
    return text if text.isprintable() else ascii(text)


def _harmless(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _fail(message: str) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(CliExit.FAILED)
