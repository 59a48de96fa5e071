"""`lmx-supervisor keys`: makes, lists and revokes API keys. Works on the file itself: no supervisor has to run."""

import contextlib
import datetime as dt
import fcntl
import json
import os
import pwd
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn

import click
import msgspec

from protocol.keys import MAX_KEYS, KeyFile, KeyRecord, KeyStoreError, digest_of, new_key
from protocol.paths import Home, UnsafeHomeError
from protocol.states import CliExit

KEYS_SCHEMA: Final = "lmx.keys/1"
_NAME: Final = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_DURATION: Final = re.compile(r"([1-9][0-9]{0,5})([mhdw])")
_SECONDS: Final = {"m": 60, "h": 3600, "d": 86400, "w": 604800}
_ID_BYTES: Final = 4
_HEADINGS: Final = ("ID", "NAME", "SCOPE", "MODELS", "RPM", "TPM", "CONCURRENCY", "PRIORITY", "EXPIRES")


class _Expiry(click.ParamType[float]):
    """A moment, as Unix time."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read `30d` or `2027-01-31`."""
        found = _DURATION.fullmatch(value)
        if found is not None:
            return time.time() + int(found[1]) * _SECONDS[found[2]]
        try:
            moment = dt.datetime.fromisoformat(value)
            at = (moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).timestamp()
        except (ValueError, OverflowError):
            self.fail("write it as 30d (m, h, d, w) or as a date, 2027-01-31", param, ctx)
        if at <= time.time():
            self.fail("that moment is over", param, ctx)
        return at


@click.group()
def keys() -> None:
    """Make, list and revoke API keys; what is changed counts at once, without a restart."""


@keys.command()
@click.option("--name", required=True, help="Who it is for.")
@click.option("--scope", type=click.Choice(["inference", "admin"]), default="inference", show_default=True)
@click.option("--models", multiple=True, help="Only these models; commas between them [all].")
@click.option("--rpm", type=click.IntRange(0, 1_000_000), help="Requests per minute; 0: no limit [the configured].")
@click.option("--tpm", type=click.IntRange(0, 1_000_000_000), help="Tokens per minute; 0: no limit [the configured].")
@click.option("--concurrency", type=click.IntRange(0, 100_000), help="Requests at a time; 0: no limit.")
@click.option("--priority", type=click.IntRange(-100, 100), default=0, show_default=True, help="Higher goes first.")
@click.option("--expires", type=_Expiry(), help="After so long (30d) or on a date (2027-01-31) [never].")
@click.option("--json", "as_json", is_flag=True, help="Print the document lmx.keys/1, with the key.")
@click.pass_obj
def create(home: Home, /, *, name: str, as_json: bool, expires: float | None, **options: Any) -> None:
    """Make a key and print it. It is shown this once: only its digest is stored."""
    if not _NAME.fullmatch(name):
        msg = "a name has letters, digits, '.', '_', '-' and '@', at most 64"
        raise click.BadParameter(msg, param_hint="--name")
    key = new_key()
    record = KeyRecord(
        id=secrets.token_hex(_ID_BYTES),
        name=name,
        digest=digest_of(key.encode()).hex(),
        created_at=time.time(),
        scope=options["scope"],
        models=tuple(part.strip() for text in options["models"] for part in text.split(",") if part.strip()),
        requests_per_minute=options["rpm"],
        tokens_per_minute=options["tpm"],
        concurrent_requests=options["concurrency"],
        priority=options["priority"],
        expires_at=expires,
    )

    def add(present: tuple[KeyRecord, ...]) -> tuple[KeyRecord, ...]:
        if any({name, record.id} & {other.name, other.id} for other in present):
            _fail(f"there is a key {name} already: choose another name, or revoke it first")
        if len(present) >= MAX_KEYS:
            _fail(f"there are {MAX_KEYS} keys; no more fit: revoke some")
        return (*present, record)

    _change(home, add)
    _note(home, "key_created", record)
    if as_json:
        click.echo(json.dumps({"schema": KEYS_SCHEMA, "key": key, "keys": [_plain(record, time.time())]}, indent=2))
        return
    click.echo(key)
    click.echo(f"key {name} ({record.id}) is made; it is shown only now", err=True)


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the document lmx.keys/1.")
@click.pass_obj
def list_(home: Home, as_json: bool) -> None:
    """Show every key that is not revoked, never the key itself."""
    try:
        records = KeyFile(home.keys).read()
    except KeyStoreError as error:
        _fail(str(error))
    now = time.time()
    if as_json:
        document = {"schema": KEYS_SCHEMA, "keys": [_plain(record, now) for record in records]}
        click.echo(json.dumps(document, indent=2))
    else:
        click.echo(keys_text(records, now))


@keys.command()
@click.argument("key", metavar="KEY")
@click.pass_obj
def revoke(home: Home, key: str) -> None:
    """Revoke KEY, a name or an id: its next request is refused."""

    revoked: list[KeyRecord] = []

    def drop(present: tuple[KeyRecord, ...]) -> tuple[KeyRecord, ...]:
        revoked[:] = [record for record in present if key in {record.id, record.name}]
        kept = tuple(record for record in present if record not in revoked)
        if len(kept) == len(present):
            _fail(f"there is no key {key[:64]!r}: see lmx-supervisor keys list")
        return kept

    _change(home, drop)
    for record in revoked:
        _note(home, "key_revoked", record)
    click.echo(f"{key} is revoked")


def keys_text(records: tuple[KeyRecord, ...], now: float) -> str:
    """Return the table of keys."""
    if not records:
        return "There are no keys."
    table = [_HEADINGS, *(_row(record, now) for record in records)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)


def _row(record: KeyRecord, now: float) -> tuple[str, ...]:
    numbers = (record.requests_per_minute, record.tokens_per_minute, record.concurrent_requests)
    expires = "never"
    if record.expires_at is not None:
        expires = f"{dt.datetime.fromtimestamp(record.expires_at, dt.UTC):%Y-%m-%d %H:%MZ}"
        expires += " (over)" * record.expired(now)
    return (
        record.id,
        record.name,
        record.scope,
        ",".join(record.models) or "all",
        *("default" if number is None else "none" if number == 0 else str(number) for number in numbers),
        str(record.priority),
        expires,
    )


def _plain(record: KeyRecord, now: float) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(record)
    del fields["digest"]  # of no use to anybody, and not to be compared with by others
    fields["expired"] = record.expired(now)
    return fields


def _change(home: Home, change: Callable[[tuple[KeyRecord, ...]], tuple[KeyRecord, ...]]) -> None:
    from supervisor.platform import current_platform

    try:
        home.ensure()
    except UnsafeHomeError as error:
        _fail(str(error), CliExit.BAD_CONFIG)
    try:
        with _alone(home):
            file = KeyFile(home.keys, current_platform().full_sync)
            file.write(change(file.read()))
    except KeyStoreError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"the keys could not be stored: {error.strerror or error}")


def _note(home: Home, what: str, record: KeyRecord) -> None:
    """Write down who changed which key, never the key."""
    from supervisor.journal import add_apart

    try:
        by = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        by = ""
    try:
        add_apart(home.journal, what, key=record.id, name=record.name, scope=record.scope, by=by, uid=os.getuid())
    except OSError as error:
        click.echo(f"warning: the journal did not take it: {error.strerror or error}", err=True)


@contextlib.contextmanager
def _alone(home: Home) -> Iterator[None]:
    """Keep other `keys` commands of this home waiting while the block runs."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(home.keys.with_name("keys.lock"), flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _fail(message: str, code: CliExit = CliExit.FAILED) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)
