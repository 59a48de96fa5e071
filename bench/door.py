"""What the door costs a request: the middleware in this process, with and without keys and limits.

.venv/bin/python -m bench.door
"""

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

from protocol.config import LimitsConfig
from tests.security.doorkit import PROXIES, DoorKit

ROUNDS, REQUESTS = 15, 400
MANY = LimitsConfig(inference_per_minute=1_000_000, tokens_per_minute=1_000_000_000, concurrent_requests=1000)
SECURITY: dict[str, Any] = {"profile": "lan", "trusted_proxies": PROXIES}


async def measure(kit: DoorKit, *, key: str, keys: int = 0, door: bool = True) -> float:
    """Return the microseconds of CPU time a request takes, in the best of the rounds."""
    for number in range(keys):
        kit.key(f"k{number}")
    scope_headers = [(b"host", b"127.0.0.1:1234"), (b"content-type", b"application/json"), (b"accept", b"*/*")]
    scope_headers += [(b"user-agent", b"OpenAI/Python"), (b"content-length", b"120")]
    scope_headers += [(b"authorization", f"Bearer {key}".encode())] if key else []
    body = b'{"model": "tiny", "max_tokens": 20, "messages": [{"role": "user", "content": "hello"}]}'

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(_message: Any) -> None:
        pass

    async def inner(_scope: Any, receive: Any, _send: Any) -> None:
        await receive()

    app: Any = inner
    if door:
        outermost: Any = kit.door.cls
        app = outermost(inner, **kit.door.kwargs)

    from gateway.context import RequestContext, attach
    from gateway.hosts import HostGuard

    if door:
        app = HostGuard(app, ("own",), frozenset())
    best = []
    for _ in range(ROUNDS):
        took = 0.0
        for _ in range(REQUESTS):
            scope: Any = {"type": "http", "method": "POST", "path": "/chat/completions", "headers": scope_headers}
            scope |= {"client": ("192.0.2.7", 5), "state": {}}
            attach(scope, RequestContext("r", 0.0, None))
            began = time.thread_time()
            await app(scope, receive, send)
            took += time.thread_time() - began
        best.append(took / REQUESTS * 1e6)
    return min(best)


async def main() -> None:
    """Print the table."""
    rows = []
    for name, limits, security, with_key, keys in (
        ("no door", LimitsConfig(), {}, False, 0),
        ("local, no key, no limits", LimitsConfig(), {}, False, 0),
        ("lan, no key, limit on requests", LimitsConfig(inference_per_minute=1_000_000), SECURITY, False, 0),
        ("a key of 1,000, no limits", LimitsConfig(0, 0), SECURITY, True, 1000),
        ("a key, all limits", MANY, SECURITY, True, 10),
    ):
        kit = DoorKit(Path(tempfile.mkdtemp()), limits, **security)
        key = kit.key() if with_key else ""
        rows.append((name, await measure(kit, key=key, keys=keys, door=name != "no door")))
    print("| | µs a request |\n|---|---|")
    for name, took in rows:
        print(f"| {name} | {took:.1f} |")


if __name__ == "__main__":
    asyncio.run(main())
