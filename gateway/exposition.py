"""Every metric: its name, what it says, and where its values come from. Names are vLLM's where vLLM has one.

prometheus-client makes the text of it; it is imported when the first scrape comes, not at every start.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from gateway.numbers import Distribution, ModelNumbers, Numbers
from gateway.vitals import ModelVitals, ThermalVitals, Vitals
from protocol import __version__
from protocol.control import CatalogModel
from protocol.data import Finish
from protocol.errors import ERRORS
from protocol.states import ModelState

if TYPE_CHECKING:
    from prometheus_client.core import Metric

METRICS_SCHEMA: Final = "lmx.metrics/1"
_AUTH: Final = ("invalid_api_key", "forbidden")
_THROTTLED: Final = ("rate_limit_exceeded", "server_busy")
_SHED: Final = ("load_shedding", "insufficient_memory")
#: Failures that no client could have avoided.
_OURS: Final = tuple(code for code, row in ERRORS.items() if row.status >= 500 or code == "server_busy")
_MODEL: Final = ("model_name",)


class Loads(NamedTuple):
    """Of one model, now: requests that a process works on, and requests that wait for one or for a slot."""

    running: int
    waiting: int


class AuditCounts(NamedTuple):
    """Rows of the audit since this gateway began; `problem` says why none can be written now, "" if they can."""

    written: int = 0
    dropped: int = 0
    waiting: int = 0
    problem: str = ""


class Scene(NamedTuple):
    """Everything that metrics are made of, at one moment."""

    numbers: Numbers
    vitals: Vitals | None
    catalog: list[CatalogModel]
    loads: Mapping[str, Loads]
    shedding: bool
    open_calls: int
    connections: int
    audit: AuditCounts = AuditCounts()


#: Label values and the value.
Sample = tuple[tuple[str, ...], float]


class Row(NamedTuple):
    """One metric that is a number. `kind` is "counter" or "gauge"."""

    name: str
    kind: str
    words: str
    labels: tuple[str, ...]
    samples: Callable[[Scene], Iterable[Sample]]


class HistogramRow(NamedTuple):
    """One metric that is a distribution, for each model."""

    name: str
    words: str
    of: Callable[[ModelNumbers], Distribution]


HISTOGRAMS: Final = (
    HistogramRow("lmx_time_to_first_token_seconds", "From the request's head to the first text", lambda n: n.ttft),
    HistogramRow("lmx_inter_token_latency_seconds", "Between two tokens of an answer", lambda n: n.gap),
    HistogramRow("lmx_e2e_request_latency_seconds", "From the request's head to its whole answer", lambda n: n.whole),
    HistogramRow("lmx_request_queue_time_seconds", "Until a process had taken the request", lambda n: n.queue),
    HistogramRow("lmx_request_prefill_time_seconds", "From there to the first text", lambda n: n.prefill),
    HistogramRow("lmx_request_decode_time_seconds", "From there to the end", lambda n: n.decode),
    HistogramRow("lmx_request_prompt_tokens", "Tokens of a prompt", lambda n: n.prompt),
    HistogramRow("lmx_request_generation_tokens", "Tokens of an answer", lambda n: n.generation),
)


def _each(value: Callable[[ModelNumbers], float]) -> Callable[[Scene], Iterator[Sample]]:
    return lambda scene: (((model,), value(numbers)) for model, numbers in scene.numbers.models.items())


def _by(
    counts: Callable[[ModelNumbers], Mapping[str, int]], always: Iterable[str]
) -> Callable[[Scene], Iterator[Sample]]:
    """Ends of requests by their kind. Of these kinds zeros too, so that a rate can be taken from the first on, for
    models that were asked or are more than a folder.
    """
    zeros = dict.fromkeys(always, 0)

    def samples(scene: Scene) -> Iterator[Sample]:
        there = (model.id for model in scene.catalog if model.state is not ModelState.STOPPED)
        for model in dict.fromkeys((*scene.numbers.models, *there)):
            numbers = scene.numbers.models.get(model)
            for kind, value in {**zeros, **(counts(numbers) if numbers is not None else {})}.items():
                yield (model, kind), value

    return samples


def _errors(codes: Collection[str]) -> Callable[[Scene], Iterator[Sample]]:
    """Those of these codes, zeros too, so that a rate can be taken from the first on."""
    return lambda scene: (((code,), scene.numbers.errors[code]) for code in codes)


def _seen(value: Callable[[ModelVitals], float | None]) -> Callable[[Scene], Iterator[Sample]]:
    """What the supervisor says of each model, if it knows it."""
    return lambda scene: (
        ((model.id,), found)
        for model in (scene.vitals.models if scene.vitals is not None else ())
        if (found := value(model)) is not None
    )


def _host(value: Callable[[Vitals], float | None]) -> Callable[[Scene], Iterator[Sample]]:
    return lambda scene: (
        ((), found)
        for vitals in ([scene.vitals] if scene.vitals is not None else [])
        if (found := value(vitals)) is not None
    )


def _thermal(value: Callable[[ThermalVitals], float | None]) -> Callable[[Scene], Iterator[Sample]]:
    return _host(lambda vitals: None if vitals.thermal is None else value(vitals.thermal))


def _counted(name: str, labels: tuple[str, ...]) -> Callable[[Scene], Iterator[Sample]]:
    """What the supervisor has counted; of models also the zeros, so that a rate can be taken from the first on."""

    def samples(scene: Scene) -> Iterator[Sample]:
        vitals = scene.vitals
        if vitals is None:
            return
        found: dict[tuple[str, ...], int] = {
            tuple(count.model if label == "model_name" else count.kind for label in labels): count.value
            for count in vitals.counters
            if count.name == name
        }
        if labels == _MODEL:
            found = {(model.id,): 0 for model in vitals.models} | found
        yield from found.items()

    return samples


def _states(scene: Scene) -> Iterator[Sample]:
    for model in scene.catalog:
        for state in ModelState:
            yield (model.id, state.value), float(model.state is state)


def _limits(scene: Scene) -> Iterator[Sample]:
    """The limit of the moment, where memory may have lowered it; else the configured one."""
    seen = {each.id: each.concurrent_limit for each in scene.vitals.models} if scene.vitals is not None else {}
    for model in scene.catalog:
        known = model.capabilities
        limit = seen.get(model.id) or (known.max_concurrent_requests if known is not None else None)
        if limit is not None and model.state is not ModelState.STOPPED:
            yield (model.id,), limit


ROWS: Final = (
    # -- requests, as this gateway saw them
    Row("lmx_prompt_tokens", "counter", "Tokens of prompts", _MODEL, _each(lambda n: n.prompt_tokens)),
    Row("lmx_generation_tokens", "counter", "Tokens of answers", _MODEL, _each(lambda n: n.generation_tokens)),
    Row("lmx_prefix_cache_queries", "counter", "Tokens looked for in caches", _MODEL, _each(lambda n: n.prompt_tokens)),
    Row("lmx_prefix_cache_hits", "counter", "Tokens found in caches", _MODEL, _each(lambda n: n.cached_tokens)),
    Row(
        "lmx_request_success", "counter", "Requests that were answered whole", (*_MODEL, "finished_reason"),
        _by(lambda n: n.finished, (finish.name.lower() for finish in Finish)),
    ),
    Row(
        "lmx_request_failures", "counter", "Requests that failed", (*_MODEL, "code"),
        _by(lambda n: n.failed, _OURS),
    ),
    Row("lmx_request_cancellations", "counter", "Requests whose client left", _MODEL, _each(lambda n: n.cancelled)),
    Row(
        "lmx_request_continuations", "counter", "Times a request was in a process that crashed", _MODEL,
        _each(lambda n: n.continued),
    ),
    Row(
        "lmx_num_requests_running", "gauge", "Requests a process works on", _MODEL,
        lambda scene: (((model,), load.running) for model, load in scene.loads.items()),
    ),
    Row(
        "lmx_num_requests_waiting", "gauge", "Requests that wait for a process or a slot", _MODEL,
        lambda scene: (((model,), load.waiting) for model, load in scene.loads.items()),
    ),
    Row(
        "lmx_queued_requests", "gauge", "Requests waiting for an inference slot, of all models", (),
        lambda scene: [((), sum(load.waiting for load in scene.loads.values()))],
    ),
    Row("lmx_concurrent_limit", "gauge", "Requests a model runs at once", _MODEL, _limits),
    Row(
        "lmx_http_responses", "counter", "Answers by route and status", ("route", "status"),
        lambda scene: (((route, str(status)), n) for (route, status), n in tuple(scene.numbers.answers.items())),
    ),
    Row("lmx_errors", "counter", "Errors by their code", ("code",), _errors(ERRORS)),
    Row("lmx_auth_failures", "counter", "Requests refused for their key", ("code",), _errors(_AUTH)),
    Row("lmx_throttled_requests", "counter", "Requests refused for a limit", ("code",), _errors(_THROTTLED)),
    Row("lmx_shed_requests", "counter", "Requests refused for want of memory", ("code",), _errors(_SHED)),
    Row("lmx_open_calls", "gauge", "Calls for inference under way", (), lambda scene: [((), scene.open_calls)]),
    Row("lmx_open_connections", "gauge", "Connections of clients", (), lambda scene: [((), scene.connections)]),
    # -- models and their processes, as the supervisor sees them
    Row("lmx_model_state", "gauge", "1 for the state a model is in", (*_MODEL, "state"), _states),
    Row(
        "lmx_worker_restarts", "counter", "Processes started after one that ended so", (*_MODEL, "exit_class"),
        _counted("worker_restarts", (*_MODEL, "exit_class")),
    ),
    Row(
        "lmx_worker_exits", "counter", "Processes that ended so", (*_MODEL, "exit_class"),
        _counted("worker_exits", (*_MODEL, "exit_class")),
    ),
    Row("lmx_model_quarantines", "counter", "Models set aside", _MODEL, _counted("quarantines", _MODEL)),
    Row("lmx_canary_failures", "counter", "Self-tests that failed", _MODEL, _counted("canary_failures", _MODEL)),
    Row("lmx_worker_hangs", "counter", "Processes ended for standing still", _MODEL, _counted("hangs", _MODEL)),
    Row("lmx_model_evictions", "counter", "Models unloaded for others or idle", _MODEL, _counted("evictions", _MODEL)),
    Row("lmx_memory_kills", "counter", "Processes ended for memory", _MODEL, _counted("memory_kills", _MODEL)),
    Row(
        "lmx_memory_rotations", "counter", "Processes replaced for memory", _MODEL,
        _counted("memory_rotations", _MODEL),
    ),
    Row(
        "lmx_gateway_exits", "counter", "Gateways that ended so", ("exit_class",),
        _counted("gateway_exits", ("exit_class",)),
    ),
    Row(
        "lmx_lifecycle_events", "counter", "Entries of the journal", ("event",),
        _counted("lifecycle_events", ("event",)),
    ),
    Row(
        "lmx_admin_actions", "counter", "What administrators ordered", ("action",),
        _counted("admin_actions", ("action",)),
    ),
    Row("lmx_worker_memory_bytes", "gauge", "What a process occupies", _MODEL, _seen(lambda m: m.memory_bytes)),
    Row("lmx_worker_memory_limit_bytes", "gauge", "What it may occupy", _MODEL, _seen(lambda m: m.limit_bytes)),
    Row("lmx_model_need_bytes", "gauge", "What the ledger reserves for it", _MODEL, _seen(lambda m: m.need_bytes)),
    Row("lmx_mlx_active_bytes", "gauge", "MLX's arrays", _MODEL, _seen(lambda m: m.active_bytes)),
    Row("lmx_mlx_cache_bytes", "gauge", "Buffers MLX keeps", _MODEL, _seen(lambda m: m.cache_bytes)),
    Row("lmx_mlx_peak_bytes", "gauge", "The most MLX's arrays ever were", _MODEL, _seen(lambda m: m.peak_bytes)),
    Row("lmx_model_degraded", "gauge", "1 while it runs degraded", _MODEL, _seen(lambda m: float(m.degraded))),
    Row(
        "lmx_worker_heartbeat_late", "gauge", "1 while a process is silent", _MODEL,
        _seen(lambda m: float(m.heartbeat_late)),
    ),
    # -- the machine and the supervisor
    Row("lmx_memory_total_bytes", "gauge", "Memory of the machine", (), _host(lambda v: v.memory.total_bytes)),
    Row("lmx_memory_available_bytes", "gauge", "What is free of it", (), _host(lambda v: v.memory.available_bytes)),
    Row("lmx_memory_used_ratio", "gauge", "Share in use", (), _host(lambda v: v.memory.machine_used_share)),
    Row("lmx_memory_lmx_bytes", "gauge", "What LMX occupies", (), _host(lambda v: v.memory.used_bytes)),
    Row("lmx_memory_budget_bytes", "gauge", "What LMX may occupy", (), _host(lambda v: v.memory.limit_bytes)),
    Row("lmx_memory_free_bytes", "gauge", "What a load could still have", (), _host(lambda v: v.memory.free_bytes)),
    Row(
        "lmx_memory_shedding", "gauge", "1 while requests are refused for memory", (),
        lambda scene: [((), float(scene.shedding))],
    ),
    Row("lmx_safe_mode", "gauge", "1 in safe mode", (), _host(lambda v: float(bool(v.supervisor.safe_mode)))),
    Row("lmx_state_durable", "gauge", "1 if state is on disk", (), _host(lambda v: float(v.supervisor.state_durable))),
    Row(
        "lmx_host_breaker_open", "gauge", "1 while starts are held back", (),
        _host(lambda v: float(bool(v.supervisor.host_breaker_open_s))),
    ),
    Row(
        "lmx_supervisor_internal_errors", "counter", "Bugs the supervisor survived", (),
        _host(lambda v: v.supervisor.internal_errors),
    ),
    Row("lmx_supervisor_uptime_seconds", "gauge", "Age of the supervisor", (), _host(lambda v: v.supervisor.uptime_s)),
    Row("lmx_supervisor_up", "gauge", "1 while it is heard", (), lambda scene: [((), float(scene.vitals is not None))]),
    Row("lmx_audit_rows", "counter", "Rows of the audit that were written", (), lambda s: [((), s.audit.written)]),
    Row("lmx_audit_dropped_rows", "counter", "Rows that were lost", (), lambda s: [((), s.audit.dropped)]),
    Row("lmx_audit_waiting_rows", "gauge", "Rows to be written", (), lambda s: [((), s.audit.waiting)]),
    Row("lmx_gpu_frequency_mhz", "gauge", "Clock of the GPU", (), _thermal(lambda t: t.gpu_freq_mhz)),
    Row("lmx_gpu_temperature_celsius", "gauge", "Its heat", (), _thermal(lambda t: t.gpu_temp_c)),
    Row("lmx_info", "gauge", "1, with the version", ("version",), lambda _scene: [((__version__,), 1.0)]),
)  # fmt: skip


def warm() -> None:
    """Do what the first scrape would need 0.1 s for. May be called in another thread."""
    import prometheus_client  # noqa: F401, PLC0415 - see above


def families(scene: Scene) -> Iterator["Metric"]:
    """Yield every metric with its samples. The first call imports prometheus-client, which takes 0.1 s."""
    from prometheus_client.core import (  # noqa: PLC0415 - most gateways are never asked
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    makers = MappingProxyType({"counter": CounterMetricFamily, "gauge": GaugeMetricFamily})
    for histogram in HISTOGRAMS:
        family = HistogramMetricFamily(histogram.name, f"{histogram.words}.", labels=_MODEL)
        for model, numbers in tuple(scene.numbers.models.items()):
            found = histogram.of(numbers)
            family.add_metric((model,), _buckets(found), found.total)
        yield family
    for row in ROWS:
        numbers_of = makers[row.kind](row.name, f"{row.words}.", labels=row.labels)
        for labels, value in row.samples(scene):
            numbers_of.add_metric(labels, value)
        yield numbers_of


def text(scene: Scene) -> bytes:
    """Return the text format of Prometheus."""
    from prometheus_client import CollectorRegistry, generate_latest  # noqa: PLC0415 - see above

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(scene))
    return generate_latest(registry)


def document(scene: Scene) -> dict[str, Any]:
    """Return the same, as the document lmx.metrics/1."""
    return {
        "schema": METRICS_SCHEMA,
        "metrics": [
            {
                "name": family.name,
                "type": family.type,
                "help": family.documentation,
                "samples": [
                    {"name": sample.name, "labels": dict(sample.labels), "value": sample.value}
                    for sample in family.samples
                ],
            }
            for family in families(scene)
        ],
    }


class _Collector:
    """What a registry of one scrape asks."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene

    def collect(self) -> Iterator["Metric"]:
        """Yield every metric."""
        return families(self._scene)


def _buckets(found: Distribution) -> list[tuple[str, float]]:
    """Return the buckets as Prometheus counts them: each with all that are below."""
    below = 0
    made: list[tuple[str, float]] = []
    for bound, count in zip((*found.bounds, math.inf), found.counts, strict=True):
        below += count
        made.append(("+Inf" if math.isinf(bound) else str(float(bound)), below))
    return made
