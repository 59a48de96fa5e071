"""A model that is really loaded and asked keeps to the limits of its spec, and nothing wires memory behind our back."""

from pathlib import Path

import mlx.core as mx
import pytest

from protocol.config import LifecycleConfig, ModelsConfig
from protocol.kvsize import kv_shape
from protocol.modelfolder import read_config
from protocol.spec import MemoryLimits, WorkerSpec
from worker.jobs import Job
from worker.loading import load_mlx

MIB = 1024**2


def test_a_loaded_model_has_real_limits_and_never_touches_the_wired_one(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(limit: int) -> int:
        raise AssertionError(limit)

    monkeypatch.setattr(mx, "set_wired_limit", forbidden)
    # A device with a recommendation, as every Mac is: what would make mlx-lm set the limit.
    monkeypatch.setattr(mx, "device_info", lambda *_: {"max_recommended_working_set_size": 2**34})
    limits = MemoryLimits(memory_bytes=900 * MIB, buffer_bytes=70 * MIB)
    spec = WorkerSpec(
        "w", "tiny", 1, str(tiny_model), "", "", "", "INFO", ModelsConfig(), LifecycleConfig(), memory=limits
    )
    before = mx.set_memory_limit(2**40), mx.set_cache_limit(2**40)
    try:
        loaded = load_mlx(spec, lambda *_: None)
        loaded.canary()
        loaded.backend.insert(Job(1, [5, 6, 7], 20))
        while len(loaded.backend):
            loaded.backend.step()
        assert (mx.set_memory_limit(before[0]), mx.set_cache_limit(before[1])) == (900 * MIB, 70 * MIB)
    finally:
        mx.set_memory_limit(before[0])
        mx.set_cache_limit(before[1])
    assert loaded.cache == kv_shape(read_config(tiny_model))
    assert loaded.cache.token_bytes > 0


def test_what_is_projected_covers_what_the_batch_really_keeps(tiny_model: Path) -> None:
    """Rows of very different lengths, because the batch keeps each as long as the longest."""
    from mlx_lm.utils import load_model

    from worker.batch import BatchBackend
    from worker.room import Room

    model, config = load_model(tiny_model)
    backend = BatchBackend(model, {config["eos_token_id"]}, slots=8, prefill_tokens=256)
    room = Room(kv_shape(read_config(tiny_model)), 2**40)
    for number, length in enumerate((700, 10, 30, 250, 9)):
        backend.insert(Job(number, [5 + number] * length, 40, logit_bias={config["eos_token_id"]: -100.0}))
        room.take(number, length + 40)
    most = 0
    while len(backend) == 5:
        backend.step()
        most = max(most, backend._generator.prompt_cache_nbytes)
    # A few bytes a row for offsets; and it is a real bound, not a wild one.
    assert room.reserved * 0.5 < most <= room.reserved + 64 * 1024
