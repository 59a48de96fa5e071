"""Prefixes on disk: a thread that reads and writes blocks, so that the engine never waits for a file.

One folder per model and binding under `$LMX_HOME/cache`, one file per block. The main thread asks and later polls;
arrays of MLX are touched by it alone: this thread sees their memory, which does not change any more.
"""

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from queue import Empty, Queue
from typing import Any, Final, NamedTuple

from protocol.logs import event, exception_event
from worker.prefix_file import BadBlockError, read_block, write_block
from worker.prefix_shelf import Shelf

#: Bytes that may wait to be written; what comes then is not written now.
_MAX_WAITING_BYTES: Final = 256 * 1024 * 1024
#: Bytes that were read and that the main thread has not taken over; more are read when it has.
_MAX_UNREAD_BYTES: Final = 128 * 1024 * 1024
#: After an error of the disk nothing is written for so long.
_REST_S: Final = 60.0
_MAX_TOUCHES: Final = 4096
#: After an error of the engine a write that is under way is waited for so long.
_DISOWN_S: Final = 1.0


class Loaded(NamedTuple):
    """A block that was asked for; None if it is not there or no good. `last` of its ticket."""

    ticket: int
    name: bytes
    payload: memoryview | None
    last: bool


class _Save(NamedTuple):
    name: bytes
    depth: int
    #: Emptied once it is written: the main thread, which owns its memory, is to be the last to let go of it.
    payload: list[memoryview]
    nbytes: int


class _Load(NamedTuple):
    ticket: int
    names: Sequence[bytes]


class _Saved(NamedTuple):
    name: bytes
    written: bool


class _Waiting(NamedTuple):
    """A block that is to be written, and what keeps its memory."""

    nbytes: int
    owner: Any


class PrefixDisk:
    """All methods are for the main thread."""

    def __init__(self, shelf: Shelf, binding: bytes, block_bytes: int) -> None:
        """Open the folder of one model, whose blocks all have so many bytes; raise `OSError`."""
        self._shelf = shelf
        self._binding = binding
        self._block_bytes = block_bytes
        #: What can be asked for.
        self._names: set[bytes] = shelf.open()
        self._ours: set[bytes] = set()
        self._waiting: dict[bytes, _Waiting] = {}
        self._tickets = 0
        # No SimpleQueue: in CPython 3.11 a signal during its wait with a timeout can make that wait endless.
        self._results: Queue[Loaded | _Saved | set[bytes]] = Queue()
        self._condition = threading.Condition()
        self._loads: deque[_Load] = deque()
        #: Tickets somebody still waits for.
        self._wanted: set[int] = set()
        self._unread = 0
        self._others: deque[_Save | list[tuple[bytes, int]]] = deque()
        self._closing = False
        #: What is written from now on is worth nothing.
        self._disowned = False
        self._rest_until = 0.0
        self._thread = threading.Thread(target=self._run, name="prefix-disk", daemon=True)
        self._thread.start()

    def __contains__(self, name: bytes) -> bool:
        return name in self._names

    @property
    def waiting(self) -> int:
        """Blocks that are still to be written."""
        return len(self._waiting)

    def load(self, names: Sequence[bytes]) -> int:
        """Ask for blocks; each comes back from `poll` with the number that is returned. 0: nobody is there to ask."""
        if not self._thread.is_alive():
            return 0
        self._tickets += 1
        with self._condition:
            self._wanted.add(self._tickets)
            self._loads.append(_Load(self._tickets, list(names)))
            self._condition.notify()
        return self._tickets

    def forget(self, ticket: int) -> None:
        """Read no more of what was asked for with this ticket; what was read still comes."""
        with self._condition:
            self._wanted.discard(ticket)
            self._condition.notify()

    def save(self, name: bytes, depth: int, payload: Sequence[memoryview], owner: Any, nbytes: int) -> bool:
        """Have a block written; return whether it will be. `owner` keeps the payload in memory."""
        if name in self._names or name in self._waiting:
            return True
        waiting = sum(one.nbytes for one in self._waiting.values())
        if self._closing or waiting + nbytes > _MAX_WAITING_BYTES or not self._thread.is_alive():
            return False
        self._waiting[name] = _Waiting(nbytes, owner)
        with self._condition:
            self._others.append(_Save(name, depth, list(payload), nbytes))
            self._condition.notify()
        return True

    def touch(self, used: list[tuple[bytes, int]]) -> None:
        """Note that blocks (name, depth) were used."""
        with self._condition:
            if len(self._others) < _MAX_TOUCHES:
                self._others.append([(name, depth) for name, depth in used if name in self._names])
                self._condition.notify()

    def poll(self, wait_s: float = 0.0) -> Loaded | None:
        """Return the next block that has arrived; None if there is none now. Also notes what was written."""
        until = time.monotonic() + wait_s
        while True:
            try:
                result = self._results.get(timeout=max(0.0, until - time.monotonic())) if wait_s else self._get()
            except Empty:
                return None
            if isinstance(result, Loaded):
                if result.payload is None:
                    self._names.discard(result.name)
                else:
                    with self._condition:
                        self._unread -= result.payload.nbytes
                        self._condition.notify()
                return result
            if isinstance(result, set):
                # Also without what other processes have removed since.
                self._names &= result
                self._ours &= result
                continue
            self._waiting.pop(result.name, None)
            if result.written:
                self._names.add(result.name)
                self._ours.add(result.name)

    def close(self, within_s: float) -> None:
        """Write what waits, as far as that goes in so many seconds."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join(within_s)

    def disown(self) -> None:
        """Remove everything that this process wrote: after an error of the engine nobody knows what it is worth."""
        with self._condition:
            self._disowned = True
            self._loads.clear()
            self._others.clear()
        self.close(_DISOWN_S)
        while self.poll() is not None:
            pass
        for name in self._ours | self._waiting.keys():
            with contextlib.suppress(OSError):
                self._shelf.remove(name)
        event("prefixes_disowned", level="WARNING", blocks=len(self._ours))

    def _get(self) -> "Loaded | _Saved | set[bytes]":
        return self._results.get_nowait()

    # -- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._sweep()
            while True:
                item = self._next()
                if item is None:
                    return
                self._do(item)
        except Exception as error:  # noqa: BLE001 - the boundary of this thread: without it the model serves on
            exception_event("prefix_disk_failed", error)

    def _next(self) -> "_Load | _Save | list[tuple[bytes, int]] | None":
        with self._condition:
            while not (self._loads or self._others):
                if self._closing:
                    return None
                self._condition.wait()
            return self._loads.popleft() if self._loads else self._others.popleft()

    def _do(self, item: "_Load | _Save | list[tuple[bytes, int]]") -> None:
        if isinstance(item, _Load):
            self._load(item)
        elif isinstance(item, _Save):
            written = self._save(item)
            item.payload.clear()
            self._results.put(_Saved(item.name, written))
        else:
            now_ns = time.time_ns()  # of all: a thread that is held up between two would turn their order around
            for name, depth in item:
                with contextlib.suppress(OSError):
                    self._shelf.touch(name, depth, now_ns)

    def _load(self, load: _Load) -> None:
        for number, name in enumerate(load.names, 1):
            if not self._may_read(load.ticket):
                return
            payload = None
            try:
                payload = read_block(self._shelf.folder, self._binding, name, self._block_bytes)
            except BadBlockError as error:
                event("prefix_block_bad", level="WARNING", why=str(error))
                with contextlib.suppress(OSError):
                    self._shelf.remove(name)
            except OSError:
                pass  # another process made room
            last = payload is None or number == len(load.names)
            with self._condition:
                self._unread += 0 if payload is None else payload.nbytes
                if last:
                    self._wanted.discard(load.ticket)
            self._results.put(Loaded(load.ticket, name, payload, last))
            if last:
                return

    def _may_read(self, ticket: int) -> bool:
        """Wait until there is room for what is read; return whether anybody still wants it."""
        with self._condition:
            self._condition.wait_for(
                lambda: self._closing or ticket not in self._wanted or self._unread < _MAX_UNREAD_BYTES
            )
            return ticket in self._wanted and not self._closing

    def _save(self, save: _Save) -> bool:
        if time.monotonic() < self._rest_until:
            return False
        try:
            if not self._shelf.has_room(save.nbytes):
                self._sweep(save.nbytes)
            if not self._shelf.has_room(save.nbytes):
                return False
            written = write_block(self._shelf.folder, self._binding, save.name, save.payload)
            if self._disowned:  # meanwhile, and nobody may have waited for the end of this one
                self._shelf.remove(save.name)
                return False
            self._shelf.wrote(save.name, save.depth, written)
        except OSError as error:
            self._rest_until = time.monotonic() + _REST_S
            event("prefix_disk_refused", level="WARNING", why=os.strerror(error.errno or 0), rest_s=_REST_S)
            return False
        return True

    def _sweep(self, coming: int = 0) -> None:
        self._results.put(self._shelf.sweep(coming))
