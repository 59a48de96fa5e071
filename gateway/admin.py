"""Every route under `/admin` in one place. The door has let in administrators only; errors are RFC 9457 problems."""

from pathlib import Path
from typing import Final

from starlette.routing import BaseRoute, Route, WebSocketRoute

from gateway.admin_benchmark import Benchmark
from gateway.admin_events import Events
from gateway.admin_health import AdminHealth
from gateway.admin_models import Fit, Load, ModelOrder, ModelsStatus, Restart
from gateway.admin_system import Crash, Crashes, Reload, Resume, Status
from gateway.audit import Audit
from gateway.audit_routes import AuditPage, AuditSocket, AuditStream
from gateway.body import BodyReader
from gateway.calls import Calls
from gateway.catalog import CatalogView
from gateway.forward import Forwarder
from gateway.logs_route import Logs
from gateway.traffic import Traffic
from gateway.vitals import VitalsView
from protocol.control import PinRequest, ResetRequest, UnloadRequest

#: Orders are a few fields.
_MAX_BODY_BYTES: Final = 16 * 1024


def admin_routes(
    forwarder: Forwarder,
    catalog: CatalogView,
    traffic: Traffic,
    vitals: VitalsView,
    audit: Audit,
    calls: Calls,
    logs: Path | None = None,
) -> list[BaseRoute]:
    """Return the routes. What is added here has its row in docs/admin.md."""
    bodies = BodyReader(_MAX_BODY_BYTES)
    load = Load(forwarder, bodies)
    unload = ModelOrder(forwarder, bodies, UnloadRequest)
    return [
        Route("/admin/models", ModelsStatus(forwarder, catalog), methods=["GET"]),
        Route("/admin/models/fit", Fit(forwarder), methods=["GET"]),
        Route("/admin/models/load", load, methods=["POST"]),
        Route("/admin/models/unload", unload, methods=["POST"]),
        # The short names of earlier plans.
        Route("/admin/load", load, methods=["POST"]),
        Route("/admin/unload", unload, methods=["POST"]),
        Route("/admin/models/restart", Restart(forwarder, bodies), methods=["POST"]),
        Route("/admin/models/pin", ModelOrder(forwarder, bodies, _pin), methods=["POST"]),
        Route("/admin/models/unpin", ModelOrder(forwarder, bodies, _unpin), methods=["POST"]),
        Route("/admin/models/reset", ModelOrder(forwarder, bodies, ResetRequest), methods=["POST"]),
        Route("/admin/benchmark", Benchmark(calls, bodies), methods=["POST"]),
        Route("/admin/config/reload", Reload(forwarder), methods=["POST"]),
        Route("/admin/resume", Resume(forwarder), methods=["POST"]),
        Route("/admin/health", AdminHealth(forwarder, catalog, vitals, traffic, audit), methods=["GET"]),
        Route("/admin/status", Status(forwarder), methods=["GET"]),
        Route("/admin/crashes", Crashes(forwarder), methods=["GET"]),
        Route("/admin/crashes/{id}", Crash(forwarder), methods=["GET"]),
        Route("/admin/events", Events(forwarder, traffic), methods=["GET"]),
        Route("/admin/logs", Logs(logs), methods=["GET"]),
        Route("/admin/audit", AuditPage(audit), methods=["GET"]),
        Route("/admin/audit/stream", AuditStream(audit, traffic), methods=["GET"]),
        WebSocketRoute("/ws/audit-logs", AuditSocket(audit, traffic)),
    ]


def _pin(model: str) -> PinRequest:
    return PinRequest(model, pinned=True)


def _unpin(model: str) -> PinRequest:
    return PinRequest(model, pinned=False)
