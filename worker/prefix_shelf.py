"""The files of all models' prefixes: where they lie, how many bytes they may take, which go first.

`cache/SLOT/BINDING/NAME.kv`. The limit is for the whole of `cache`, which workers of several models share: each removes
the files that were used least recently, whosever they are. A file that goes while another wants it is a miss.
"""

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Final

from worker.prefix_file import TEMPORARY, name_of, path_of

#: Small models make small files; a folder of more is slow to look through.
MAX_FILES: Final = 20_000
#: What others write meanwhile is seen this often, and whenever so large a part of the limit was written.
_COUNT_EVERY_S: Final = 60.0
_COUNT_EVERY_PART: Final = 16
#: Of a file, besides its payload: some 120.
_HEAD_BYTES: Final = 512
#: When there is no room, so much of the limit is made free at once.
_SPARE_SHARE: Final = 0.1
#: A temporary file of this age is nobody's any more.
_STALE_S: Final = 600.0
#: Times of one sequence: each block is older than the one before it, so that the deepest go first.
_DEPTH_NS: Final = 1_000_000


class Shelf:
    """One model's folder, and the limit of all. `open` is for the main thread, the rest for that of the disk."""

    def __init__(self, root: Path, slot: str, binding: bytes, limit_bytes: int) -> None:
        self._root = root
        self._slot = root / slot
        self.folder = self._slot / binding.hex()[:32]
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._files = 0
        self._counted_at = 0.0
        #: Bytes written since, and how many others may have written as many.
        self._written = 0
        self._others = 0

    def open(self) -> set[bytes]:
        """Make the folder, remove those of what this model was before, return the names in it; raise `OSError`."""
        for folder in (self._root, self._slot, self.folder):
            folder.mkdir(mode=0o700, exist_ok=True)
        for other in self._slot.iterdir():
            if other != self.folder:
                shutil.rmtree(other, ignore_errors=True)
        names = {name_of(entry.name) for entry in os.scandir(self.folder)}
        return {name for name in names if name is not None}

    def has_room(self, nbytes: int) -> bool:
        """Return whether a file of that size may be written, as far as is known."""
        nbytes += _HEAD_BYTES
        fresh = time.monotonic() - self._counted_at < _COUNT_EVERY_S
        fresh = fresh and self._written + nbytes <= max(nbytes, self._limit_bytes // _COUNT_EVERY_PART)
        return fresh and self._bytes + nbytes <= self._ours_to_fill and self._files < MAX_FILES

    @property
    def _ours_to_fill(self) -> int:
        """The limit without what others may have written since they were last seen, each between two counts."""
        return self._limit_bytes - min(self._others * (self._limit_bytes // _COUNT_EVERY_PART), self._limit_bytes // 2)

    def wrote(self, name: bytes, depth: int, nbytes: int) -> None:
        """Note a file that was written; raise `OSError`."""
        self._bytes += nbytes
        self._written += nbytes
        self._files += 1
        self.touch(name, depth, time.time_ns())

    def touch(self, name: bytes, depth: int, now_ns: int) -> None:
        """Note that a block was used, at one Unix time for all of a sequence; raise `OSError`."""
        at = now_ns - depth * _DEPTH_NS
        os.utime(path_of(self.folder, name), ns=(at, at))

    def remove(self, name: bytes) -> None:
        """Remove a block, or what is in its place; raise `OSError`."""
        path = path_of(self.folder, name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def sweep(self, coming: int = 0) -> set[bytes]:
        """Count what is there, and make room if it is too much; return what is left of this model.

        A file that cannot be removed is left and counted.
        """
        files = self._look()
        self._bytes = sum(size for _, size, _ in files)
        self._files = len(files)
        self._counted_at = time.monotonic()
        self._written = 0
        self._others = len({file.parent.parent for _, _, file in files} - {self._slot})
        coming += _HEAD_BYTES
        ours = {file for _, _, file in files if file.parent == self.folder}
        if self._bytes + coming > self._ours_to_fill or self._files >= MAX_FILES:
            least = int(self._ours_to_fill * (1 - _SPARE_SHARE))
            for _, size, file in sorted(files):
                if self._bytes + coming <= least and self._files < MAX_FILES * (1 - _SPARE_SHARE):
                    break
                try:
                    file.unlink(missing_ok=True)
                except OSError:
                    continue
                self._bytes -= size
                self._files -= 1
                ours.discard(file)
        names = {name_of(file.name) for file in ours}
        return {name for name in names if name is not None}

    def _look(self) -> list[tuple[int, int, Path]]:
        """Return time, size and path of each file, having removed what broke off."""
        found = []
        for folder in self._root.glob("*/*"):
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):
                        status = entry.stat(follow_symlinks=False)
                        if entry.name.endswith(TEMPORARY) and time.time() - status.st_mtime > _STALE_S:
                            Path(entry.path).unlink(missing_ok=True)
                            continue
                        found.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
        return found
