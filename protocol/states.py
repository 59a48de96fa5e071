"""Names for the life of a model, shared by the supervisor, the catalog and the screens."""

from enum import IntEnum, StrEnum


class ModelState(StrEnum):
    """Where a model is in its life (design 6)."""

    STOPPED = "stopped"
    STARTING = "starting"
    LOADING = "loading"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    QUARANTINED = "quarantined"


class Phase(StrEnum):
    """What a worker says it is doing; the supervisor's deadlines depend on it."""

    LOADING = "loading"
    WARMING = "warming"
    IDLE = "idle"
    PREFILL = "prefill"
    DECODE = "decode"
    DRAINING = "draining"


class WorkerExit(IntEnum):
    """Exit codes of a worker: part of the contract, each with one meaning (design 6)."""

    ASKED = 0
    USAGE = 64
    CORRUPT_MODEL = 65
    MISSING_MODEL = 66
    NO_DEVICE = 69
    BUG = 70
    REMOTE_CODE_REFUSED = 77
    BAD_CONFIG = 78
    GPU_POISONED = 86
    METAL_OUT_OF_MEMORY = 87
    RESOURCE_LIMIT = 88
    STALLED = 89
    LEASE_EXPIRED = 90


class CliExit(IntEnum):
    """Exit codes of `lmx-supervisor` (design 11)."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_READY = 3
    UNREACHABLE = 4
    BAD_CONFIG = 5
    TIMED_OUT = 6
