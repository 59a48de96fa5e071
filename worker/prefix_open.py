"""Makes the prefix cache of a model that has just been loaded. Main thread only."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

from protocol.logs import event
from protocol.spec import WorkerSpec
from worker.fingerprint import fingerprint
from worker.prefix_boundary import Boundaries, can_keep_states
from worker.prefix_cache import NoPrefixes, PrefixCache
from worker.prefix_disk import PrefixDisk
from worker.prefix_kv import probe
from worker.prefix_shelf import Shelf
from worker.prefix_wear import Wear
from worker.prefixes import Prefixes

#: Of what MLX was told to keep to: above it prefixes give way. Below the supervisor's first mark, at which it would
#: refuse requests, also with the buffers that MLX keeps.
_BUSY_SHARE: Final = 0.7
#: Prefixes that nobody has come back to are written at once up to this share of the disk's limit, then as much a day.
_BURST_SHARE: Final = 4
_MAX_BURST: Final = 1024**3


def open_prefixes(spec: WorkerSpec, model: Any) -> PrefixCache:
    """Return the cache; it keeps nothing where the configuration or the model has none."""
    limit = spec.memory.prefix_bytes
    if not limit:
        return NoPrefixes()
    memory = spec.memory.memory_bytes
    spare = _spare(memory) if memory else None
    layout = probe(model)
    if layout is None:
        if can_keep_states(model):
            return Boundaries(limit, spare=spare)
        event("prefix_cache_off", why="this model's caches cannot be taken out of a batch")
        return NoPrefixes()
    try:
        found = fingerprint(Path(spec.path))
    except OSError as error:
        event("prefix_cache_off", level="WARNING", why=error.strerror or "the model's folder cannot be read")
        return NoPrefixes()
    binding = hashlib.sha256(found + layout.description.encode()).digest()
    disk = _open_disk(spec, binding, layout.block_bytes)
    now, size = time.monotonic(), spec.prefix_disk_bytes
    wear = Wear(min(_MAX_BURST, size // _BURST_SHARE), size, now)
    return Prefixes(layout, binding, limit, disk=disk, wear=wear, spare=spare)


def _spare(memory_bytes: int) -> Callable[[], int]:
    allowed = int(memory_bytes * _BUSY_SHARE)
    return lambda: allowed - mx.get_active_memory()


def _open_disk(spec: WorkerSpec, binding: bytes, block_bytes: int) -> PrefixDisk | None:
    if not spec.prefix_folder or not spec.prefix_disk_bytes:
        return None
    shelf = Shelf(Path(spec.prefix_folder), spec.slot, binding, spec.prefix_disk_bytes)
    try:
        return PrefixDisk(shelf, binding, block_bytes)
    except OSError as error:
        event("prefix_disk_refused", level="WARNING", why=error.strerror or "", rest_s=None)
        return None
