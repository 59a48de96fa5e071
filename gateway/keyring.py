"""The keys this gateway knows: the file is looked at again whenever it changed, so a revoked key is refused at once."""

import hmac
import os
from pathlib import Path
from typing import Final

from protocol.keys import KeyFile, KeyRecord, KeyStoreError
from protocol.logs import event

#: Bytes of a digest by which records are looked up; the rest is compared in constant time.
_INDEX_BYTES: Final = 8
_Signature = tuple[int, ...]


class Keyring:
    """Finds the record of a key. A look costs one `stat`, some microseconds."""

    def __init__(self, file: Path | None) -> None:
        self._path = os.fspath(file) if file is not None else None
        self._file = KeyFile(file) if file is not None else None
        self._signature: _Signature | None = None
        self._records: dict[bytes, list[tuple[bytes, KeyRecord]]] = {}
        self._problem = ""

    def find(self, digest: bytes) -> KeyRecord | None:
        """Return the record of the key with this SHA-256, None if there is none.

        Raises `KeyStoreError` if nobody can tell.
        """
        self._refresh()
        if self._problem:
            raise KeyStoreError(self._problem)
        found = None
        for stored, record in self._records.get(digest[:_INDEX_BYTES], ()):
            if hmac.compare_digest(stored, digest):
                found = record
        return found

    def _refresh(self) -> None:
        if self._path is None or self._file is None:
            return
        try:
            status = os.stat(self._path, follow_symlinks=False)  # noqa: PTH116 - a third of the time of Path.stat
            signature: _Signature = (status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode, status.st_uid)
        except FileNotFoundError:
            signature = ()
        except OSError as error:
            self._fail(f"the keys cannot be looked at: {error.strerror}")
            self._signature = None
            return
        if signature != self._signature:
            self._load(self._file)
            self._signature = signature

    def _load(self, file: KeyFile) -> None:
        try:
            keys = file.read()
            records: dict[bytes, list[tuple[bytes, KeyRecord]]] = {}
            for record in keys:
                digest = bytes.fromhex(record.digest)
                records.setdefault(digest[:_INDEX_BYTES], []).append((digest, record))
        except (KeyStoreError, ValueError) as error:
            self._fail(str(error))
            return
        self._problem = ""
        self._records = records
        event("keys_read", count=len(keys))

    def _fail(self, problem: str) -> None:
        """Forget every key: an old copy cannot know what was revoked since."""
        self._records = {}
        if problem != self._problem:
            self._problem = problem
            event("keys_unreadable", level="ERROR", reason=problem)
