"""A small durable file: one header line and a JSON payload, replaced atomically, with the previous one kept.

The header is `{"kind","schema","sequence","length","sha256"}`. Saving writes a temporary file, syncs it, renames the
live file to `.prev` and the temporary one to the live name, and syncs the directory (design 9). A file that does not
check out is kept aside as `.bad`, never an exception; a file of a newer schema is left alone and not overwritten.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from protocol.secretfile import SecretFileError, read_private

_MAX_BYTES: Final = 16 * 1024 * 1024
_HEADER_ROOM: Final = 1024
#: What msgspec raises for bytes that are not the JSON it should find; bytes that are not UTF-8 are not its own error.
_UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class _Header(msgspec.Struct):
    kind: str
    schema: int
    sequence: int
    length: int
    sha256: str


class Loaded(msgspec.Struct, frozen=True):
    """What was found: the payload (None if nothing usable) and what was wrong on the way, in words."""

    payload: Any
    problems: tuple[str, ...] = ()


class UnusableError(Exception):
    """The file is damaged; the text says how."""


class _NewerSchemaError(Exception):
    """The file was written by a later version."""


class StateFile:
    """One durable document, owned by one process. `sync` makes a descriptor's data survive a power loss.

    `shape` is the type of the payload: a whole file with another content is as unusable as a damaged one. Without
    `keep_previous` there is never a moment without the file, and no older version to fall back to: for what must not
    come back, such as a key that was revoked.
    """

    def __init__(
        self,
        file: Path,
        *,
        kind: str,
        schema: int,
        sync: Callable[[int], None] = os.fsync,
        shape: Any = Any,
        keep_previous: bool = True,
        private: bool = False,
    ) -> None:
        self._file = file
        self._kind = kind
        self._schema = schema
        self._sync = sync
        self._shape = shape
        self._keep_previous = keep_previous
        #: A link, or a file that others can read or write, is unusable.
        self._private = private
        self._sequence = 0
        self._read_only = False

    @property
    def _previous(self) -> Path:
        return self._file.with_name(self._file.name + ".prev")

    def load(self) -> Loaded:
        """Return the newest usable payload: the live file's, else the previous one's, else None."""
        problems: list[str] = []
        for candidate in (self._file, self._previous):
            try:
                return Loaded(self._read(candidate), tuple(problems))
            except FileNotFoundError:
                continue
            except _NewerSchemaError as error:
                self._read_only = True
                return Loaded(None, (*problems, str(error)))
            except (OSError, UnusableError) as error:
                problems.append(f"{candidate.name}: {error}")
                _keep_aside(candidate)
        return Loaded(None, tuple(problems))

    def peek(self) -> Any:
        """Return the payload without touching anything, for a reader that does not own the file; None if unusable."""
        for candidate in (self._file, self._previous):
            try:
                return self._read(candidate)
            except (OSError, UnusableError, _NewerSchemaError):
                continue
        return None

    def read(self) -> Any:
        """Return the payload of the live file and of no other; raise `UnusableError` with what is wrong with it.

        Raises `FileNotFoundError` if there is none. Touches nothing.
        """
        try:
            return self._read(self._file)
        except _NewerSchemaError as error:
            raise UnusableError(str(error)) from None
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UnusableError(error.strerror or str(error)) from None

    def save(self, payload: object) -> None:
        """Replace the document durably; raise `OSError` if the disk does not take it (the old one then stays)."""
        if self._read_only:
            msg = f"{self._file} was written by a newer version and is left as it is"
            raise OSError(msg)
        body = msgspec.json.encode(payload)
        if len(body) > _MAX_BYTES - _HEADER_ROOM:
            msg = f"{self._file.name} would be {len(body):,} bytes long, which could not be read again"
            raise OSError(msg)
        header = _Header(self._kind, self._schema, self._sequence + 1, len(body), hashlib.sha256(body).hexdigest())
        temporary = self._file.with_name(self._file.name + ".tmp")
        try:
            self._write(temporary, msgspec.json.encode(header) + b"\n" + body)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()  # half a file on a full disk helps nobody
            raise
        if self._keep_previous and self._file.exists():
            self._file.replace(self._previous)
        temporary.replace(self._file)
        self._sync_directory()
        self._sequence += 1

    def _write(self, file: Path, data: bytes) -> None:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            written = os.write(descriptor, data)
            while written < len(data):  # a full disk gives a short write first
                written += os.write(descriptor, data[written:])
            self._sync(descriptor)
        finally:
            os.close(descriptor)

    def _sync_directory(self) -> None:
        descriptor = os.open(self._file.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _bytes(self, file: Path) -> bytes:
        if not self._private:
            with file.open("rb") as stream:
                return stream.read(_MAX_BYTES + 1)
        try:
            return read_private(file, _MAX_BYTES + 1, "remove it")
        except SecretFileError as error:
            raise UnusableError(str(error)) from None

    def _read(self, file: Path) -> Any:
        data = self._bytes(file)
        line, _, body = data.partition(b"\n")
        try:
            header = msgspec.json.decode(line, type=_Header)
        except _UNREADABLE:
            reason = "the header cannot be read"
            raise UnusableError(reason) from None
        if header.kind != self._kind:
            reason = f"it holds {header.kind!r:.40}, not {self._kind}"
            raise UnusableError(reason)
        if header.length != len(body) or header.sha256 != hashlib.sha256(body).hexdigest():
            reason = "the contents do not match the checksum"
            raise UnusableError(reason)
        if header.schema > self._schema:
            reason = f"{file} has schema {header.schema}; this version knows {self._schema} and leaves it as it is"
            raise _NewerSchemaError(reason)
        try:
            payload = msgspec.convert(msgspec.json.decode(body), self._shape)
        except msgspec.ValidationError as error:
            reason = f"the contents have another shape: {error!s:.200}"
            raise UnusableError(reason) from None
        except _UNREADABLE:
            reason = "the contents are not JSON"
            raise UnusableError(reason) from None
        self._sequence = max(self._sequence, header.sequence)
        return payload


def _keep_aside(file: Path) -> None:
    try:
        file.replace(file.with_name(file.name + ".bad"))
    except OSError:
        return  # an unreadable folder is reported by the next save
