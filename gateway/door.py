"""The door: who comes in, and how much they may take. Decided from the head of a request, before its body is read.

Health routes are open to everyone. Everything under `/admin` and `/ws` is for administrators. All the rest, also what
does not exist, is inference. Whatever goes wrong in here refuses the request.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.auth import Access, Authenticator, Credential, credential_of, looks_like_a_token, unauthorized
from gateway.context import context_of, is_admin_path
from gateway.hosts import HostGuard
from gateway.identity import client_address, client_name, peer_address, within
from gateway.inspection import Inspected, estimate, wanted_of
from gateway.keyring import Keyring
from gateway.limits import Budget, Headers, Limiter, Reservation
from gateway.middleware import canonical_path
from gateway.refusal import has_large_body, refuse_unread
from gateway.signed_client import SignedClients, signed_clients
from protocol.errors import LmxError
from protocol.logs import exception_event
from protocol.profiles import Rules, rules
from protocol.spec import GatewaySpec

if TYPE_CHECKING:
    from gateway.jwt_access import TokenVerifier

#: No key, no limit, any host: for probes.
HEALTH: Final = frozenset({"/healthz", "/readyz"})
#: A page without anything in it, which a browser cannot send a key for: it asks for all that it shows.
_PANEL: Final = "/ui"
#: What only looks: whoever may look must not use up what is needed to mend, and screens look every few seconds.
_LOOKING: Final = frozenset({"GET", "HEAD"})
_MODEL: Final = "/models/"
_METRICS: Final = "/metrics"
_CORS_HEADERS: Final = (
    "retry-after",
    "x-request-id",
    "x-lmx-ignored",
    *(f"x-ratelimit-{name}-{what}" for what in ("requests", "tokens") for name in ("limit", "remaining", "reset")),
)
_POLICY_VIOLATION: Final = 1008
_NOTHING: Final = Budget(0, 0, 0)


def front_door(spec: GatewaySpec) -> tuple[list[Middleware], Middleware]:
    """Return what belongs outside of the error boundary, outermost first, and the door, which belongs inside."""
    settings = rules(spec.security, spec.limits)
    keyring = Keyring(Path(spec.keys_file) if spec.keys_file else None)
    authenticator = Authenticator(keyring, spec.admin_digest, keys_required=settings.keys_required)
    tokens = None
    if spec.security.jwt_keys:
        from gateway.jwt_access import TokenVerifier  # noqa: PLC0415 - an extra, and half a second

        tokens = TokenVerifier(spec.security)
    outer = [Middleware(HostGuard, allowed=settings.hosts, health=HEALTH)]
    if settings.origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=_CORS_HEADERS,
        )
        outer.append(cors)
    limiter = Limiter(settings)
    limit = spec.gateway.max_body_bytes
    return outer, Middleware(
        Door,
        rules=settings,
        authenticator=authenticator,
        limiter=limiter,
        max_body_bytes=limit,
        tokens=tokens,
        signed=signed_clients(spec.security.client_secret_file),
    )


def _check_metrics(access: Access) -> None:
    """Metrics name every model and say how much each is used: they are for who may use them all."""
    if access.key is None and not (access.admin or access.token):
        raise unauthorized("The metrics of this server need the admin key, or an API key that is good for every model.")
    if access.models:
        raise LmxError("forbidden", "A key for some models only may not see the metrics of all.")


@dataclass(slots=True)
class _Visit:
    """A request that was let in. `running`: it counts among those that run."""

    access: Access
    budget: Budget
    address: str
    running: bool = False
    reservation: Reservation | None = None


class Door:
    """The middleware."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        rules: Rules,
        authenticator: Authenticator,
        limiter: Limiter,
        max_body_bytes: int,
        tokens: "TokenVerifier | None" = None,
        signed: SignedClients | None = None,
    ) -> None:
        self._app = app
        self._rules = rules
        self._authenticator = authenticator
        self._limiter = limiter
        self._tokens = tokens
        self._signed = signed
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        if scope["type"] == "http":
            if scope["path"] in HEALTH:
                await self._app(scope, receive, send)
            else:
                await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = context_of(scope)
        try:
            visit = await self._checked(scope, context.headers)
        except LmxError as error:
            if error.code == "invalid_api_key":
                context.headers.append((b"www-authenticate", b'Bearer realm="lmx"'))
            if not has_large_body(scope):
                raise
            await refuse_unread(scope, receive, send, error)
            return
        context.access, context.address = visit.access, visit.address
        peer = scope.get("client")
        # What the endpoints pass on as the client, for fairness between clients in the worker.
        scope["client"] = (visit.access.client, peer[1] if peer else 0)
        if visit.running and (visit.budget.tokens or visit.access.models):
            receive = self._inspected(scope, receive, visit, context.headers)
        try:
            await self._app(scope, receive, send)
        except LmxError:
            context.tokens_used = context.tokens_used or 0  # refused, or failed before the first byte: nothing is owed
            raise
        finally:
            if visit.running:
                self._limiter.leave(visit.access.client)
            if visit.reservation is not None and context.tokens_used is not None:
                self._limiter.settle(visit.reservation, context.tokens_used)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            visit = await self._checked({**scope, "method": "GET", "path": canonical_path(scope["path"])}, [])
            context_of(scope).access = visit.access
        except LmxError as error:
            context_of(scope).error_code = error.code
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
        else:
            await self._app(scope, receive, send)

    async def _checked(self, scope: Scope, headers: Headers) -> _Visit:
        """Let a request in or raise `LmxError`; also for what nobody thought of."""
        try:
            return await self._admit(scope, headers)
        except LmxError:
            raise
        except Exception as error:  # noqa: BLE001 - fail closed: what cannot be checked does not come in
            exception_event("access_check_failed", error)
            text = "Whether this request is allowed could not be found out, so it is refused."
            raise LmxError("access_check_failed", text) from None

    async def _admit(self, scope: Scope, headers: Headers) -> _Visit:
        self._check_peer(scope)
        address = client_name(client_address(scope, self._rules.proxies))
        context_of(scope).address = address
        if scope["path"] == _PANEL and scope["method"] in _LOOKING:
            return _Visit(Access(address), _NOTHING, address)
        credential = credential_of(scope)
        if is_admin_path(scope["path"]):
            try:
                access = self._authenticator.admin(credential, await self._token(credential) if self._tokens else None)
            except LmxError:
                # Counted before it is refused: nobody guesses keys faster than this.
                await self._limiter.admin(address, headers)
                raise
            context_of(scope).access = access  # also of one that is refused below
            if scope["method"] not in _LOOKING:
                await self._limiter.admin(access.client, headers)
            return _Visit(access, self._limiter.budget(access), address)
        try:
            token = await self._token(credential) if self._tokens else None
            access = self._authenticator.inference(credential, address, token)
            if scope["path"] == _METRICS and not self._rules.metrics_open:
                _check_metrics(access)
            if self._signed is not None:
                access = self._signed.named(access, scope, time.time())
        except LmxError:
            stranger = Access(address)
            await self._limiter.inference(address, self._limiter.budget(stranger), headers)
            raise
        context_of(scope).access = access
        visit = _Visit(access, self._limiter.budget(access), address)
        if scope["path"].startswith(_MODEL):
            access.check_model(scope["path"].removeprefix(_MODEL))
        if scope["method"] == "POST":
            await self._limiter.inference(access.client, visit.budget, headers)
            self._limiter.enter(access.client, visit.budget.concurrent)
            visit.running = True
        return visit

    async def _token(self, credential: Credential) -> Access | None:
        """Return what an identity provider's token allows, None if there is none; raise `LmxError` for a bad one."""
        if self._tokens is None or credential.ambiguous or not looks_like_a_token(credential.key):
            return None
        return await self._tokens.access(credential.key)

    def _check_peer(self, scope: Scope) -> None:
        """Where everyone has to come through a proxy, nobody else may connect, but this machine itself."""
        if not self._rules.proxies_only:
            return
        peer = peer_address(scope)
        if peer is None or not (peer.is_loopback or within(peer, self._rules.proxies)):
            raise LmxError("forbidden", "This server is reached through its proxy only.")

    def _inspected(self, scope: Scope, receive: Receive, visit: _Visit, headers: Headers) -> Receive:
        """Return a `receive` that checks the body as soon as it is there."""

        async def check(body: bytes) -> None:
            wanted = wanted_of(body)
            if visit.access.models:
                if wanted is None:
                    raise LmxError("invalid_json", "The body is not a JSON object.")
                # A model that is no text is nobody's; the endpoint's own check would come too late.
                visit.access.check_model(wanted.model_name)
            limit = visit.budget.tokens
            if limit:
                tokens = estimate(wanted, len(body), scope["path"], limit)
                visit.reservation = await self._limiter.reserve(visit.access.client, limit, tokens, headers)

        return Inspected(receive, self._max_body_bytes, check)
