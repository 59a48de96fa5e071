"""The application: routes and what lies around them."""

from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from gateway.admin import admin_routes
from gateway.audit import Audit
from gateway.calls import Calls
from gateway.catalog import CatalogView
from gateway.chat import ChatCompletions
from gateway.completions import Completions
from gateway.context import context_of
from gateway.door import front_door
from gateway.embeddings import Embeddings
from gateway.exposition import Scene
from gateway.forward import Forwarder
from gateway.health import Healthz, Readyz
from gateway.metrics import Metrics
from gateway.middleware import ErrorBoundary, PathMiddleware, RequestIdMiddleware
from gateway.models import Model, Models
from gateway.numbers import Numbers
from gateway.openapi import OpenApi
from gateway.panel import Panel
from gateway.pool import WorkerPool
from gateway.rerank import Rerank
from gateway.tokenize import Detokenize, Tokenize
from gateway.traffic import Traffic
from gateway.vitals import VitalsView
from protocol.errors import LmxError
from protocol.spec import GatewaySpec
from protocol.tracing import Tracer

_LONGER_S: Final = 5.0


class Parts(NamedTuple):
    """What the application is made of; `scene` returns what metrics tell at this moment."""

    catalog: CatalogView
    pool: WorkerPool
    traffic: Traffic
    numbers: Numbers
    vitals: VitalsView
    scene: Callable[[], Scene]
    audit: Audit
    tracer: Tracer | None = None


def build_app(spec: GatewaySpec, parts: Parts) -> ASGIApp:
    """Return the ASGI application. Paths are written without `/v1`; `PathMiddleware` accepts both."""
    config, catalog, traffic = spec.gateway, parts.catalog, parts.traffic
    outer, door = front_door(spec)
    isolate = spec.security.isolate_prefixes
    calls = Calls(config, catalog, parts.pool, traffic, parts.numbers, parts.tracer, isolate_prefixes=isolate)
    # The supervisor's own limit comes first: it knows better words.
    forwarder = Forwarder(Path(spec.control_socket), spec.lifecycle.command_timeout_s + _LONGER_S)
    logs = Path(spec.log_file).parent if spec.log_file else None
    routes: list[BaseRoute] = [
        Route("/chat/completions", ChatCompletions(calls), methods=["POST"]),
        Route("/completions", Completions(calls), methods=["POST"]),
        Route("/embeddings", Embeddings(calls), methods=["POST"]),
        Route("/rerank", Rerank(calls), methods=["POST"]),
        Route("/tokenize", Tokenize(calls), methods=["POST"]),
        Route("/detokenize", Detokenize(calls), methods=["POST"]),
        Route("/models", Models(catalog), methods=["GET"]),
        Route("/models/{id:path}", Model(catalog), methods=["GET"]),
        Route("/openapi.json", OpenApi(), methods=["GET"]),
        Route("/healthz", Healthz(), methods=["GET"]),
        Route("/readyz", Readyz(catalog, traffic, parts.vitals), methods=["GET"]),
        Route("/metrics", Metrics(parts.scene), methods=["GET"]),
        Route("/ui", Panel(), methods=["GET"]),
        *admin_routes(forwarder, catalog, traffic, parts.vitals, parts.audit, calls, logs),
    ]
    paths = frozenset(path for route in routes if "{" not in (path := getattr(route, "path", "{")))
    app = Starlette(
        routes=routes,
        # The first is the outermost. `add_middleware` would insert in front.
        middleware=[
            Middleware(RequestIdMiddleware, traffic=traffic, numbers=parts.numbers, audit=parts.audit, paths=paths),
            Middleware(PathMiddleware),
            *outer,
            Middleware(ErrorBoundary),
            door,
        ],
        exception_handlers={HTTPException: _routing_error},
    )
    app.router.redirect_slashes = False
    return app


async def _routing_error(request: Request, error: Exception) -> Response:
    """Put Starlette's two routing errors into our words; `ErrorBoundary` answers."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        context_of(request.scope).headers.append((b"allow", allowed.encode("ascii")))
        raise LmxError("method_not_allowed", f"This route allows {allowed} only.")
    raise LmxError("not_found", "There is no such route. See /v1/models and /v1/chat/completions.")
