"""The control plane: what the supervisor and everyone else say over its unix socket.

A connection's first frame is a hello that says who dials. Frames are described in `protocol.framing`. Sizes are
bytes, durations seconds, `*_at` Unix times in seconds.
"""

from typing import Final

from protocol.messages import Decoder, Message
from protocol.states import ModelState, Phase

#: Largest control frame either side accepts, in bytes.
MAX_FRAME_BYTES: Final = 4 * 1024 * 1024

# -- hellos -----------------------------------------------------------------------------------------------------


class WorkerHello(Message, frozen=True, tag=1):
    """First frame of a worker, also after it lost a supervisor and found the next one."""

    protocol: int
    slot: str
    model: str
    incarnation: int
    pid: int
    endpoint: str
    phase: Phase
    version: str
    capabilities: "Capabilities | None" = None
    load_s: float = 0.0
    source: str = ""


class GatewayHello(Message, frozen=True, tag=2):
    """First frame of a gateway. The listening socket travels beside it as a file descriptor (SCM_RIGHTS)."""

    protocol: int
    incarnation: int
    pid: int
    version: str


class CliHello(Message, frozen=True, tag=3):
    """First frame of who asks for something: the command line, or a gateway for an administrator.

    `by` is who asked it there (a key's id, never a key), from which address, in which request; empty: someone here.
    """

    protocol: int
    version: str
    by: str = ""
    address: str = ""
    request_id: str = ""


class SpareHello(Message, frozen=True, tag=4):
    """First frame of a spare, once it has imported everything: it waits for `Assign`."""

    protocol: int
    incarnation: int
    pid: int
    version: str


# -- worker to supervisor ---------------------------------------------------------------------------------------


class Capabilities(Message, frozen=True):
    """What a ready worker can do, learnt from the loaded model."""

    max_model_len: int
    weight_bytes: int
    kinds: list[str]
    max_concurrent_requests: int
    has_chat_template: bool = True
    #: Seconds per token of one request alone, timed when it was loaded; 0 is unknown.
    step_s: float = 0.0


class Loading(Message, frozen=True, tag=8):
    """Bytes of weights that are in memory, of how many."""

    done_bytes: int
    total_bytes: int
    stage: str = "weights"


class Ready(Message, frozen=True, tag=9):
    """The mandatory canary (one generated token) has passed."""

    capabilities: Capabilities
    load_s: float


class Heartbeat(Message, frozen=True, tag=10):
    """Sent each second by the IO thread. Only an advancing `step` proves that the engine lives."""

    phase: Phase
    step: int
    step_age_s: float
    running: int
    waiting: int
    active_bytes: int
    cache_bytes: int
    peak_bytes: int
    #: Requests that were taken since the process began: shows use also between two heartbeats.
    requests: int = 0
    #: Requests that it runs at once for now; and bytes of cache that are promised to requests, of how many (0: any).
    concurrent_limit: int = 0
    kv_reserved_bytes: int = 0
    kv_limit_bytes: int = 0


class Dying(Message, frozen=True, tag=11):
    """Last words before a worker ends itself: a class and text for the operator, never a prompt."""

    code: int
    message: str


class Drained(Message, frozen=True, tag=12):
    """No request is left; the sender waits for `Stop`."""


# -- supervisor to worker and gateway ---------------------------------------------------------------------------


class Welcome(Message, frozen=True, tag=16):
    """Answer to a hello. A peer that then hears nothing for `lease_s` drains and exits."""

    protocol: int
    lease_s: float


class Drain(Message, frozen=True, tag=17):
    """Take no new requests; let the running ones end within `grace_s`, then report `Drained`.

    With `hand_over` a gateway only stops to accept connections: another one has the same listening socket already.
    """

    grace_s: float
    hand_over: bool = False


class Stop(Message, frozen=True, tag=18):
    """End now; what still runs is failed with `code`, an error of `protocol.errors`."""

    reason: str
    code: str = ""


class CatalogModel(Message, frozen=True):
    """One model as a client may see it. `error_code` says why it does not serve, if it does not."""

    id: str
    state: ModelState
    created_at: int
    incarnation: int = 0
    endpoint: str = ""
    capabilities: Capabilities | None = None
    error_code: str = ""
    reason: str = ""
    retry_after_s: int | None = None
    done_bytes: int = 0
    total_bytes: int = 0
    #: Not loaded, but it will be for the first request.
    on_demand: bool = False


class Catalog(Message, frozen=True, tag=19):
    """Everything the gateway needs to route, whole, on each change: one message is enough after a restart."""

    version: int
    models: list[CatalogModel]
    #: The machine is short of memory: no inference is begun.
    shedding: bool = False


class Ping(Message, frozen=True, tag=20):
    """Renews the lease of its receiver. A gateway's brings the document lmx.status/1, with `counters`, as JSON."""

    status: bytes = b""


class Assign(Message, frozen=True, tag=21):
    """To a spare: become this worker. `spec` is a `protocol.spec.WorkerSpec` as JSON."""

    spec: bytes


class Relieve(Message, frozen=True, tag=22):
    """To a worker that uses much memory: take no new requests for `close_s` (0: take them), clear caches if `clear`.

    Where the machine is short of memory: run at most `slots` requests at once (0: all that are configured) for
    `slots_s`. It is said again while it is so: a worker that hears nothing more takes requests when the time is over.
    """

    close_s: float = 0.0
    clear: bool = False
    slots: int = 0
    slots_s: float = 0.0


# -- gateway to supervisor --------------------------------------------------------------------------------------


class GatewayReady(Message, frozen=True, tag=24):
    """The gateway has the catalog and accepts connections."""


class GatewayHeartbeat(Message, frozen=True, tag=25):
    """Sent each second by the gateway's event loop."""

    open_requests: int
    sockets: int = 0
    #: It takes no more requests: somebody asked it to end, or it was without a supervisor for too long.
    draining: bool = False


class Casualties(Message, frozen=True, tag=26):
    """A model's process ended while it had these requests (client-visible ids), for the crash record; at most 256."""

    model: str
    incarnation: int
    requests: list[str]


class Misbehaved(Message, frozen=True, tag=27):
    """A worker sent what no worker may send, three times: the gateway does not listen to it any more."""

    model: str
    incarnation: int


class Wanted(Message, frozen=True, tag=28):
    """A request came for a model that is loaded on demand. Said again while requests for it come."""

    model: str


# -- command line to supervisor and back ------------------------------------------------------------------------


class StatusRequest(Message, frozen=True, tag=32):
    """Ask for `StatusReply`; with `watch` again after each change, at most every second."""

    watch: bool = False


class LoadRequest(Message, frozen=True, tag=33):
    """Load the model folder at `path` under `id`. Answers: `Progress` any number of times, then `Result`.

    An empty path stands for the folder of a model that is known by its id.
    """

    id: str
    path: str
    pin: bool = False
    #: Unload it after so long without a request, 0 never; None takes the configured time.
    ttl_s: float | None = None


class UnloadRequest(Message, frozen=True, tag=34):
    """Drain and end a model's process, and forget that it should be live."""

    id: str


class RestartRequest(Message, frozen=True, tag=35):
    """Replace a model's process; the `Result` comes when the new one is ready. `force` skips the drain."""

    id: str
    force: bool = False


class StopRequest(Message, frozen=True, tag=36):
    """Drain everything and end the supervisor."""


class ResetRequest(Message, frozen=True, tag=37):
    """Forget a model's failures; if it is set aside, start it again."""

    id: str


class ResumeRequest(Message, frozen=True, tag=38):
    """Leave safe mode: load what should be live."""


class HandoverRequest(Message, frozen=True, tag=39):
    """Replace the supervisor by its present code in the same process, then the gateway; workers stay."""


class FitRequest(Message, frozen=True, tag=40):
    """Ask whether the model folder at `path` (empty: the known one) would fit under `id`; answered by `FitReply`."""

    id: str
    path: str


class PinRequest(Message, frozen=True, tag=41):
    """Keep a loaded model from being unloaded to make room or for being idle, or no longer."""

    id: str
    pinned: bool


class ReloadRequest(Message, frozen=True, tag=42):
    """Check the configuration file, and take it over if it is good."""


class CrashesRequest(Message, frozen=True, tag=43):
    """Ask for the crashes that are kept, or for the one whose id is, or begins with, `id`: `CrashesReply`."""

    id: str = ""


class EventsRequest(Message, frozen=True, tag=44):
    """Follow the journal: the newest `last` entries written after `since` (Unix time), then each new one, for ever."""

    last: int = 0
    since: float = 0.0


class StatusReply(Message, frozen=True, tag=48):
    """The document of `lmx-supervisor status --json`, encoded as JSON."""

    document: bytes


class Progress(Message, frozen=True, tag=49):
    """Where a load or restart is."""

    id: str
    state: ModelState
    done_bytes: int
    total_bytes: int
    note: str = ""


class Result(Message, frozen=True, tag=50):
    """End of a command. `exit_code` is a `CliExit`; `code`, if it failed, a key of `protocol.errors`."""

    exit_code: int
    message: str
    old_pid: int = 0
    new_pid: int = 0
    code: str = ""


class FitReply(Message, frozen=True, tag=51):
    """The document lmx.fit/1, encoded as JSON."""

    document: bytes


class CrashesReply(Message, frozen=True, tag=52):
    """The document lmx.crashes/1, encoded as JSON."""

    document: bytes


class JournalEntry(Message, frozen=True, tag=53):
    """One entry of the journal, encoded as JSON; `ts` in it is Unix time."""

    line: bytes


Hello = WorkerHello | GatewayHello | CliHello | SpareHello
FromWorker = Loading | Ready | Heartbeat | Dying | Drained
FromGateway = GatewayReady | GatewayHeartbeat | Casualties | Misbehaved | Wanted | Drained
FromCli = (
    StatusRequest
    | LoadRequest
    | UnloadRequest
    | RestartRequest
    | StopRequest
    | ResetRequest
    | ResumeRequest
    | HandoverRequest
    | FitRequest
    | PinRequest
    | ReloadRequest
    | CrashesRequest
    | EventsRequest
)
ToSupervisor = Hello | FromWorker | FromGateway | FromCli

ToWorker = Welcome | Drain | Stop | Ping | Relieve
ToGateway = Welcome | Drain | Stop | Ping | Catalog
ToCli = StatusReply | Progress | Result | FitReply | CrashesReply | JournalEntry
ToSpare = Welcome | Stop | Ping | Assign
FromSupervisor = ToWorker | ToGateway | ToCli | ToSpare


def to_supervisor_decoder() -> Decoder[ToSupervisor]:
    """Return a decoder for everything the supervisor may receive."""
    return Decoder[ToSupervisor](ToSupervisor)


def from_supervisor_decoder() -> Decoder[FromSupervisor]:
    """Return a decoder for everything the supervisor may send."""
    return Decoder[FromSupervisor](FromSupervisor)
