"""The door in this process, before an endpoint that says what came through; and requests made byte by byte."""

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.context import context_of
from gateway.door import front_door
from gateway.middleware import ErrorBoundary, PathMiddleware, RequestIdMiddleware
from gateway.numbers import Numbers
from gateway.traffic import Traffic
from protocol.config import GatewayConfig, LifecycleConfig, LimitsConfig, SecurityConfig
from protocol.keys import KeyFile, KeyRecord, digest_of, new_key
from protocol.spec import GatewaySpec

ADMIN_KEY = "an-admin-key-of-the-tests"
CHAT = "/v1/chat/completions"
PROXIES = ("10.0.0.0/8", "fd00::/8")


class Answer(NamedTuple):
    """What came back. `parts_read`: how many parts of the body were asked for."""

    status: int
    headers: dict[str, str]
    body: Any
    parts_read: int

    @property
    def code(self) -> str:
        """The code of the error."""
        return str(self.body["code"] if "code" in self.body else self.body["error"]["code"])


class DoorKit:
    """A door with its keys. `settings` are the fields of `[security]` and `[limits]`."""

    def __init__(self, folder: Path, limits: LimitsConfig | None = None, **security: Any) -> None:
        self.file = KeyFile(folder / "keys")
        self.path = folder / "keys"
        self.seen: list[Scope] = []
        #: What the endpoint does after it has read the body.
        self.work: Callable[[Scope], Awaitable[None]] | None = None
        spec = GatewaySpec(
            1, -1, "", "", "DEBUG", GatewayConfig(), LifecycleConfig(), SecurityConfig(**security),
            limits or LimitsConfig(), digest_of(ADMIN_KEY.encode()).hex(), str(self.path),
        )  # fmt: skip
        outer, self.door = front_door(spec)
        around = [Middleware(RequestIdMiddleware, traffic=Traffic(), numbers=Numbers()), Middleware(PathMiddleware)]
        app = Starlette(middleware=[*around, *outer, Middleware(ErrorBoundary), self.door])
        app.router.default = self._endpoint
        self.app: ASGIApp = app

    async def _endpoint(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        self.seen.append(scope)
        if self.work is not None:
            await self.work(scope)
        access = context_of(scope).access
        document = {"client": access.client if access else None, "admin": bool(access and access.admin)}
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": msgspec.json.encode(document)})

    def key(self, name: str = "bot", **fields: Any) -> str:
        """Make a key as `keys create` does."""
        key = new_key()
        record = KeyRecord(f"id-{name}", name, digest_of(key.encode()).hex(), time.time(), **fields)
        self.file.write((*self.file.read(), record))
        return key

    def revoke(self, name: str) -> None:
        """Revoke a key as `keys revoke` does."""
        self.file.write(tuple(record for record in self.file.read() if record.name != name))

    async def ask(
        self,
        path: str = CHAT,
        *headers: tuple[str | bytes, str | bytes],
        key: str = "",
        peer: str = "192.0.2.7",
        method: str = "POST",
        body: bytes | list[bytes] = b"{}",
        host: str = "127.0.0.1:1234",
    ) -> Answer:
        """Send one request."""
        raw = [(_bytes(name).lower(), _bytes(value)) for name, value in headers]
        raw += [(b"host", host.encode())] if host else []
        raw += [(b"authorization", b"Bearer " + key.encode())] if key else []
        scope: Scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode(), "query_string": b"", "headers": raw, "client": (peer, 5000), "scheme": "http",
            "server": ("127.0.0.1", 1234), "state": {},
        }  # fmt: skip
        parts = body if isinstance(body, list) else [body]
        read = 0
        sent: list[Message] = []

        async def receive() -> Message:
            nonlocal read
            read += 1
            if read > len(parts):
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": parts[read - 1], "more_body": read < len(parts)}

        async def send(message: Message) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        content = b"".join(message.get("body", b"") for message in sent[1:])
        document = msgspec.json.decode(content) if content[:1] in {b"{", b"["} else content
        return Answer(
            sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}, document, read
        )


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()
