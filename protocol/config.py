"""The configuration: every key with its default, unit and bounds. `docs/configuration.md` lists them for users."""

from typing import Annotated, Literal

import msgspec

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]
Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
Bytes = Annotated[int, msgspec.Meta(ge=1)]
#: 0 stands for a size that is chosen from the machine.
MaybeBytes = Annotated[int, msgspec.Meta(ge=0)]
#: May be above 1: a limit can be exceeded.
Share = Annotated[float, msgspec.Meta(gt=0, le=2)]
#: 0 or more each, so that no delay is ever "not a number".
_Delay = Annotated[float, msgspec.Meta(ge=0, le=86400)]
MaybeDelays = Annotated[tuple[_Delay, ...], msgspec.Meta(max_length=100)]
Delays = Annotated[tuple[_Delay, ...], msgspec.Meta(min_length=1, max_length=100)]
Names = Annotated[tuple[str, ...], msgspec.Meta(max_length=100)]
#: 0 is no limit, -1 what the profile says.
PerMinute = Annotated[int, msgspec.Meta(ge=-1, le=1_000_000)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of `lmx.toml`; an unknown key is an error."""


class GatewayConfig(_Section, frozen=True):
    """The HTTP side."""

    host: str = "127.0.0.1"
    #: 0 takes any free port.
    port: Port = 1234
    #: Connections the kernel holds while no gateway accepts.
    backlog: Count = 2048
    max_body_bytes: Bytes = 16 * 1024 * 1024
    max_messages: Count = 256
    max_tokens_limit: Count = 32_768
    default_temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] = 0.7
    chat_timeout_s: Seconds = 900.0
    completion_timeout_s: Seconds = 600.0
    #: Also of rerank, tokenize and detokenize: whatever is answered with one message.
    embedding_timeout_s: Seconds = 120.0
    #: Whether a field that nobody here knows is refused, rather than named in a header.
    strict: bool = False
    #: What happens to a conversation longer than the context, unless the request says.
    truncation: Literal["none", "oldest"] = "none"
    #: Silence on a stream after which a comment keeps the connection alive.
    keepalive_s: Seconds = 5.0
    #: What happens to a request whose model's process ends: go on in the next one, or fail. `X-LMX-On-Crash` overrides.
    on_crash: Literal["continue", "fail"] = "continue"
    #: A request waits this long for a model that is being loaded, or whose process is being replaced.
    hold_while_loading_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 300.0
    hold_while_restarting_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 60.0
    #: Requests that wait like that for one model; one more is refused at once.
    max_held: Count = 128
    #: A request that was in a crash alone, or on probation, this often within `quarantine_s` is refused for as long.
    quarantine_after: Count = 2
    quarantine_s: Seconds = 600.0
    #: Bytes of one answer that may wait for a slow client before it is dropped.
    max_unsent_bytes: Bytes = 1024 * 1024


class SecurityConfig(_Section, frozen=True):
    """Who may come in. What each profile demands is `protocol.profiles`."""

    profile: Literal["local", "lan", "trusted-gateway", "internet"] = "local"
    #: Whether `/v1` needs a key; auto is what the profile says.
    inference_keys: Literal["auto", "required", "optional"] = "auto"
    #: Names in `Host` that are answered. "own" stands for this machine's, "*" for any.
    allowed_hosts: Names = ("own",)
    #: Origins of web pages that may read answers. "auto" stands for what the profile says, "*" for any.
    cors_origins: Names = ("auto",)
    #: Networks (CIDR) of proxies whose `X-Forwarded-For` counts.
    trusted_proxies: Names = ()
    #: JSON Web Tokens of an identity provider (extra `lmx[jwt]`): all three, or none. `jwt_keys` is its JWKS: a file or
    #: an https address.
    jwt_issuer: str = ""
    jwt_audience: str = ""
    jwt_keys: str = ""
    jwt_algorithms: Names = ("RS256", "ES256")
    #: A scope that a token must have to be let in, and one that makes its bearer an administrator; empty: none.
    jwt_scope: str = ""
    jwt_admin_scope: str = ""
    #: The absolute path of the secret that proxies and bots sign their clients' ids with; empty: no such id counts.
    client_secret_file: str = ""
    #: Requests of different keys, or of different addresses where there are none, share no cached prefix.
    isolate_prefixes: bool = False
    #: PEM files; with both the gateway speaks TLS.
    tls_certificate: str = ""
    tls_key: str = ""


class LimitsConfig(_Section, frozen=True):
    """How much one client may take. A key can have limits of its own."""

    inference_per_minute: PerMinute = -1
    admin_per_minute: PerMinute = -1
    #: Prompt and answer together; 0 is no limit.
    tokens_per_minute: Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)] = 0
    #: Requests of one client that run at the same time; 0 is no limit.
    concurrent_requests: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 0


class ModelsConfig(_Section, frozen=True):
    """What is loaded, and how much of it one worker runs at once."""

    #: Ids loaded at start, when their folder is there.
    auto_load: tuple[str, ...] = ("smollm2-135m-instruct",)
    #: Ids in `models/` that a request loads; "*" stands for all of them.
    on_demand: tuple[str, ...] = ()
    max_concurrent_requests: Count = 32
    #: Requests that wait for a slot; one more is refused at once.
    queue_depth: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 128
    slot_timeout_s: Annotated[float, msgspec.Meta(ge=0.05, le=300)] = 30.0
    #: Tokens of all prompts together that are processed between two decode steps.
    prefill_step_tokens: Annotated[int, msgspec.Meta(ge=16, le=65536)] = 512
    #: Tokens generated within so long of those sent last go out together; 0 sends those of each step.
    gather_s: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.008


class WorkerConfig(_Section, frozen=True):
    """The machine side of a worker."""

    #: Python module that is started for each model with a spec file; another engine may be named here.
    module: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*$")] = "worker"
    #: Threads of the CPU matrix library on Linux; 0 takes half the cores, which a busy machine thanks with speed.
    blas_threads: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    #: Keep a process ready that has imported everything, for the next model to load: costs about 200 MB.
    spare: bool = False
    #: Preload OpenBLAS on Linux when it is installed.
    preload_blas: bool = True


class MemoryConfig(_Section, frozen=True):
    """The ledger of design 8. Sizes of 0 are chosen from the machine."""

    #: All processes of this home together stay below this share of the machine's memory.
    fraction: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.9
    #: Kept for the rest of the machine: the larger of the two. 0 takes 8 GiB, but at most a quarter of the machine.
    reserve_bytes: MaybeBytes = 0
    reserve_fraction: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.1
    #: A load reserves the cache of so many tokens.
    kv_tokens: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)] = 8192
    #: What one worker may use. 0 allows half as much again as was reserved for it, and at least 1 GiB more.
    worker_limit_bytes: MaybeBytes = 0
    sample_s: Annotated[float, msgspec.Meta(ge=0.02, le=60)] = 0.25
    #: Shares of a worker's limit: above it stops to admit; is replaced when idle or drained; is ended.
    soft: Share = 0.85
    hard: Share = 0.95
    kill: Share = 1.05
    #: Shares of the machine's memory in use: above models run fewer requests at once; new ones are refused; the
    #: largest model is ended.
    slow: Share = 0.85
    shed: Share = 0.95
    critical: Share = 0.98
    #: Make room for a load by unloading models that nobody uses, the least recently used first.
    evict: bool = True
    #: A load that unloads another model comes at most this often.
    evict_every_s: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 30.0
    #: A model without a request for so long is unloaded; 0 keeps it.
    ttl_s: Annotated[float, msgspec.Meta(ge=0, le=31_536_000)] = 0.0
    #: Models that are never unloaded to make room or for being idle.
    pinned: tuple[str, ...] = ()
    #: Buffers that MLX keeps for reuse: at most so many, and cleared every so often if they are more than.
    buffer_bytes: MaybeBytes = 0
    clear_above_bytes: MaybeBytes = 256 * 1024 * 1024
    clear_every_s: Seconds = 300.0
    #: A gateway above this is replaced by another one, which no request notices; 0 never.
    gateway_limit_bytes: Annotated[int, msgspec.Meta(ge=0)] = 1024**3
    #: A worker whose memory drifts above its model by this share is replaced, when idle or after the grace; 0 never.
    rotate: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.5
    rotate_grace_s: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 300.0
    #: One model is replaced for its memory at most this often.
    rotate_every_s: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 60.0


class PrefixConfig(_Section, frozen=True):
    """What is kept of prompts that were processed, for those that begin the same."""

    enabled: bool = True
    #: In the memory of each worker; 0 takes a sixteenth of the machine's, at most 4 GiB. Less when that does not fit.
    ram_bytes: MaybeBytes = 0
    #: In files, so that it outlives the process.
    disk: bool = True
    #: Of all models together.
    disk_bytes: Bytes = 8 * 1024**3


class LifecycleConfig(_Section, frozen=True):
    """Deadlines and delays of design 6, in seconds."""

    hello_s: Seconds = 20.0
    load_base_s: Seconds = 60.0
    load_per_gib_s: Seconds = 3.0
    load_stall_s: Seconds = 30.0
    warm_up_s: Seconds = 60.0
    heartbeat_s: Seconds = 1.0
    heartbeat_late_s: Seconds = 5.0
    heartbeat_hung_s: Seconds = 15.0
    #: The gateway's own heartbeat comes from its event loop, which nothing may block for long.
    gateway_hung_s: Seconds = 4.5
    prefill_s: Seconds = 60.0
    decode_s: Seconds = 30.0
    #: A model that has been idle for so long generates a token, so that a broken one is found before it is needed.
    canary_idle_s: Seconds = 60.0
    #: Lateness of the supervisor's own tick that means the machine slept.
    slept_s: Seconds = 3.0
    restart_delays_s: Delays = (0.0, 1.0, 2.0, 5.0, 15.0, 30.0, 60.0)
    restart_jitter: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.2
    #: Ready this long before a crash: the first restart has no delay.
    stable_s: Seconds = 60.0
    forgive_one_s: Seconds = 300.0
    forgive_all_s: Seconds = 600.0
    #: Crash loop: so many failures within so long, or in a row before ready, or within a window that fits slow loads.
    burst_failures: Count = 3
    burst_s: Seconds = 60.0
    unready_failures: Count = 3
    slow_failures: Count = 5
    slow_s: Seconds = 600.0
    #: From this try of a series on, a model runs degraded: one request at a time, small prefill chunks.
    degraded_from_try: Count = 3
    #: A model in quarantine is tried again after these; an empty list never does.
    probe_delays_s: MaybeDelays = (600.0, 1800.0, 3600.0)
    #: Host breaker: so many failures of two models or more within so long stop nearly all starts for a while.
    breaker_failures: Count = 4
    breaker_window_s: Seconds = 10.0
    breaker_open_s: Seconds = 60.0
    breaker_start_every_s: Seconds = 30.0
    #: Safe mode: so many starts of the supervisor itself within so long, none of them after a clean stop.
    safe_mode_starts: Count = 3
    safe_mode_s: Seconds = 60.0
    lease_s: Seconds = 120.0
    #: A new supervisor waits this long for processes of the last one to introduce themselves.
    adopt_s: Seconds = 3.0
    #: Before a model's next start: so long is waited for the memory of its last process to come back.
    reclaim_s: Seconds = 10.0
    drain_s: Seconds = 30.0
    stop_min_s: Seconds = 15.0
    stop_base_s: Seconds = 5.0
    stop_per_gib_s: Seconds = 0.25
    stop_max_s: Seconds = 120.0
    #: A process whose memory still falls is given more time, but never more than this.
    stop_falling_max_s: Seconds = 300.0
    #: A `load` or `restart-worker` command gives up waiting after this long.
    command_timeout_s: Seconds = 900.0


class AuditConfig(_Section, frozen=True):
    """The record of requests in `$LMX_HOME/audit.db`."""

    enabled: bool = True
    #: Older rows are deleted.
    retention_days: Annotated[float, msgspec.Meta(gt=0, le=3650)] = 30.0
    #: The oldest beyond this number are deleted too, some 300 bytes each; 0 keeps all.
    max_rows: Annotated[int, msgspec.Meta(ge=0)] = 5_000_000


class ThermalConfig(_Section, frozen=True):
    """Temperature and clock of the GPU, from `macmon` if it is installed."""

    #: The program, searched in PATH and where Homebrew and MacPorts install; "" measures nothing.
    macmon: str = "macmon"
    interval_s: Annotated[float, msgspec.Meta(ge=0.1, le=3600)] = 5.0
    #: A sample that is so late means that the program hangs.
    timeout_s: Annotated[float, msgspec.Meta(ge=0.1, le=60)] = 5.0
    #: Held back: slower than this while busy for more than this share of the time.
    throttled_mhz: Annotated[float, msgspec.Meta(ge=0, le=100_000)] = 1000.0
    busy: Share = 0.8


class LogConfig(_Section, frozen=True):
    """What is written to `$LMX_HOME/logs`."""

    level: Literal["TRACE", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"


class TracingConfig(_Section, frozen=True):
    """Spans of requests (`protocol.tracing`). `traceparent` is passed on whatever this says."""

    #: Nowhere; into the log; to an OpenTelemetry collector, which needs the extra `lmx[otel]`.
    spans: Literal["none", "log", "otlp"] = "none"
    #: Of the collector, with its path. Empty: OTEL_EXPORTER_OTLP_ENDPOINT, else http://localhost:4318/v1/traces.
    endpoint: str = ""
    #: Share of traces that are kept, of those that begin here.
    sample: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0


class Config(_Section, frozen=True):
    """The whole of `lmx.toml`."""

    gateway: GatewayConfig = GatewayConfig()
    security: SecurityConfig = SecurityConfig()
    limits: LimitsConfig = LimitsConfig()
    models: ModelsConfig = ModelsConfig()
    worker: WorkerConfig = WorkerConfig()
    memory: MemoryConfig = MemoryConfig()
    prefix: PrefixConfig = PrefixConfig()
    lifecycle: LifecycleConfig = LifecycleConfig()
    audit: AuditConfig = AuditConfig()
    thermal: ThermalConfig = ThermalConfig()
    log: LogConfig = LogConfig()
    tracing: TracingConfig = TracingConfig()
