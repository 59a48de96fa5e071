"""What a model will occupy, before it is loaded: from its folder, and from what earlier runs of it showed.

A process that serves a model holds Python with MLX, the tokenizer, the weights, and the cache of what it works on.
"""

import time
from pathlib import Path
from typing import Final

import msgspec

from protocol.kvsize import KvShape, kv_shape
from protocol.modelfolder import inspect_model_folder, read_config
from protocol.statefile import StateFile

_SCHEMA: Final = 1
_MIB: Final = 1024**2
#: Python with MLX and mlx-lm, measured on Linux: 52 MiB; and what a byte of tokenizer.json takes once it is parsed.
BASE_BYTES: Final = 52 * _MIB
_PER_TOKENIZER_BYTE: Final = 14
_MAX_LEARNT: Final = 200
#: A run in which something grew without end must not keep the model from being loaded again.
_MAX_TRANSIENT_SHARE: Final = 0.5
_MAX_TRANSIENT_EXTRA: Final = 1024 * _MIB


class Learnt(msgspec.Struct, frozen=True):
    """What the last run of a model occupied when ready and idle, and what more it took to get there; `at` is Unix."""

    idle_bytes: int
    transient_bytes: int
    at: float


class Prediction(msgspec.Struct, frozen=True):
    """What a model is expected to occupy, in bytes. `tokens` of cache are reserved."""

    weight_bytes: int
    base_bytes: int
    transient_bytes: int
    kv: KvShape
    tokens: int
    #: What its process may keep of prefixes: out of what its start left free, and given back when that is needed.
    prefix_bytes: int = 0

    @property
    def idle(self) -> int:
        """Ready, without a request."""
        return self.weight_bytes + self.base_bytes

    @property
    def need(self) -> int:
        """What has to be free to load it: while it works, or while it is being loaded, whichever is more."""
        return self.idle + max(self.transient_bytes, self.kv.bytes_for(self.tokens))


#: Nothing is known: of a folder that cannot be read.
UNREADABLE: Final = Prediction(0, 0, 0, KvShape(), 0)


class Memories(msgspec.Struct, frozen=True):
    """The state file: what was learnt of memory and speed, by model."""

    models: dict[str, Learnt] = {}
    #: Seconds per token of one request alone.
    paces: dict[str, float] = {}


class History:
    """What was learnt of models, kept over restarts. A disk that refuses it costs only precision."""

    def __init__(self, file: Path) -> None:
        self._file = StateFile(file, kind="lmx.memory", schema=_SCHEMA, shape=Memories)
        self._models: dict[str, Learnt] = {}
        self._paces: dict[str, float] = {}

    def load(self) -> None:
        """Read what earlier supervisors learnt."""
        loaded = self._file.load()
        if loaded.payload is not None:
            self._models = dict(loaded.payload.models)
            self._paces = dict(loaded.payload.paces)

    def of(self, key: str) -> Learnt | None:
        """Return what is known of a model."""
        return self._models.get(key)

    def learn(self, key: str, idle: int, peak: int) -> None:
        """Note a run; `peak` is the most that it occupied until it was idle."""
        self._models.pop(key, None)
        self._models[key] = Learnt(idle, max(0, peak - idle), time.time())
        while len(self._models) > _MAX_LEARNT:
            self._models.pop(next(iter(self._models)))
        self._save()

    def pace_of(self, key: str) -> float:
        """Return the seconds per token that a load of the model is held against, 0 if none is known."""
        return self._paces.get(key, 0.0)

    def learn_pace(self, key: str, step_s: float) -> None:
        """Note what the next load is held against."""
        self._paces.pop(key, None)
        self._paces[key] = step_s
        while len(self._paces) > _MAX_LEARNT:
            self._paces.pop(next(iter(self._paces)))
        self._save()

    def _save(self) -> None:
        try:
            self._file.save(Memories(self._models, self._paces))
        except OSError:
            return  # the state files that matter say that the disk is full


def key_of(path: str, weight_bytes: int, module: str) -> str:
    """Return the name under which a model is remembered: another content in the same folder is another model."""
    return f"{module}:{weight_bytes}:{path}"


def predict(path: Path, tokens: int, learnt: History, module: str) -> Prediction:
    """Read a model folder; raise `ModelFolderError` if it cannot be served. Takes milliseconds, and reads files."""
    folder = inspect_model_folder(path)
    shape = kv_shape(read_config(path))
    known = learnt.of(key_of(str(path), folder.weight_bytes, module))
    tokens = min(tokens, folder.max_model_len or tokens)
    if known is None:
        base = BASE_BYTES + _PER_TOKENIZER_BYTE * _size(path / "tokenizer.json")
        return Prediction(folder.weight_bytes, base, 0, shape, tokens)
    most = int(folder.weight_bytes * _MAX_TRANSIENT_SHARE) + _MAX_TRANSIENT_EXTRA
    # Below nothing for an engine that does not load the weights.
    base = known.idle_bytes - folder.weight_bytes
    return Prediction(folder.weight_bytes, base, min(known.transient_bytes, most), shape, tokens)


def grant(prediction: Prediction, available: int | None, wanted: int) -> Prediction:
    """Return the prediction with what its model may keep of prefixes: at most half of what its load leaves free."""
    left = 0 if available is None else max(0, available - prediction.need) // 2
    granted = min(wanted, left) if prediction.kv.bytes_for(1) else 0
    return msgspec.structs.replace(prediction, prefix_bytes=granted)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
