"""The production smoke list against a living LMX: `scripts/smoke`, `make smoke`.

Without `--url` it starts one of its own, with a tiny model in a temporary home, and may do to it what it likes. On
somebody's own instance it only looks and asks, unless `--destructive` allows it to use up limits and end a process.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import click
import httpx

from protocol.keys import new_key
from tests.harness import Lmx
from tests.modelkit import make_tiny_model

#: Few slots, so that they can all be taken; keys for everybody, so that they can be missing.
SETTINGS: Final = {
    "LMX_SECURITY__INFERENCE_KEYS": "required",
    "LMX_MODELS__MAX_CONCURRENT_REQUESTS": "2",
    "LMX_MODELS__QUEUE_DEPTH": "1",
    "LMX_LIFECYCLE__HEARTBEAT_S": "0.2",
}
CHAT: Final = "/v1/chat/completions"
PATIENCE_S: Final = 60.0


class Skip(Exception):  # noqa: N818 - nothing went wrong
    """A check that cannot be made here; the text says why."""


class Target:
    """What is looked at. `lmx` is set if it is our own."""

    def __init__(self, url: str, admin: str, key: str, *, lmx: Lmx | None, destructive: bool) -> None:
        self.url, self.admin, self.key, self.lmx, self.destructive = url, admin, key, lmx, destructive
        self.http = httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False)
        self.model = ""
        self.id = f"smoke-{os.getpid()}-{int(time.time())}"

    async def get(self, path: str, key: str | None = None, **query: Any) -> httpx.Response:
        return await self.http.get(path, params=query, headers=bearer(self.admin if key is None else key))

    async def ask(self, key: str | None = None, *, tokens: int = 8, name: str = "", **more: Any) -> httpx.Response:
        headers = bearer(self.key if key is None else key) | ({"x-request-id": name} if name else {})
        return await self.http.post(CHAT, json=self.body(tokens, **more), headers=headers)

    def body(self, tokens: int, **more: Any) -> dict[str, Any]:
        turns = [{"role": "user", "content": "Say something."}]
        return {"model": self.model, "messages": turns, "max_tokens": tokens, **more}

    def own(self) -> Lmx:
        if self.lmx is None:
            raise Skip("only on an instance of its own")
        return self.lmx

    def may_harm(self) -> None:
        if not self.destructive:
            raise Skip("needs --destructive")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


async def health(target: Target) -> str:
    alive, ready = await target.http.get("/healthz"), await target.http.get("/readyz")
    assert (alive.status_code, ready.status_code) == (200, 200), f"{alive.status_code}, {ready.text}"
    return f"version {alive.json()['version']}"


async def admin_auth(target: Target) -> str:
    statuses = [(await target.get("/admin/status", key)).status_code for key in ("", new_key(), target.admin)]
    assert statuses == [401, 403, 200], f"no key, a wrong one, the admin key: {statuses}"
    return "401, 403, 200"


async def inference_auth(target: Target) -> str:
    forged = await target.ask(new_key())
    assert (forged.status_code, forged.json()["error"]["code"]) == (401, "invalid_api_key"), forged.text
    if target.lmx is not None:
        assert (await target.ask("")).status_code == 401
    return "a key that is nobody's gets 401"


async def answers(target: Target) -> str:
    whole = await target.ask(name=target.id)
    assert whole.status_code == 200, whole.text
    assert whole.json()["usage"]["completion_tokens"] > 0
    stream = await target.ask(stream=True)
    assert stream.status_code == 200, stream.text
    assert stream.text.rstrip().endswith("data: [DONE]"), stream.text[-200:]
    return f"{target.model}: whole and streamed"


async def request_id(target: Target) -> str:
    wrong = await target.http.post(CHAT, content=b"{", headers={**bearer(target.key), "x-request-id": f"{target.id}-e"})
    body = wrong.json()["error"]
    assert wrong.status_code == 400, wrong.text
    assert wrong.headers["x-request-id"] == body["request_id"] == f"{target.id}-e", wrong.text
    wanted, events = {"http_request", "inference_complete", "request_accepted"}, set[str]()
    async for _ in trying():
        lines = (await target.get("/admin/logs", n=1000)).json()
        events = {line["event"] for line in lines if target.id in (line.get("request_id"), line.get("trace"))}
        if wanted <= events:
            break
    assert wanted <= events, f"in the logs: {events}"
    return "in response, error, the gateway's log and the worker's"


async def audit(target: Target) -> str:
    async for _ in trying():
        rows = (await target.get("/admin/audit", request_id=target.id)).json()["data"]
        if rows:
            break
    assert rows, "no row"
    row = rows[0]
    assert (row["status"], row["model"]) == ("success", target.model), row
    assert row["completion_tokens"] > 0
    return f"{row['total_tokens']} tokens in {row['duration_ms']:.0f} ms"


async def throttling(target: Target) -> str:
    if target.lmx is not None:
        key = target.lmx.cli("keys", "create", "--name", "hasty", "--rpm", "2").stdout.strip()
        limit = 2
    else:
        probe = await target.ask()
        key, limit = target.key, int(probe.headers.get("x-ratelimit-limit-requests", 0))
        if not limit:
            raise Skip("this client has no limit")
        target.may_harm()
    for _ in range(limit + 1):
        answer = await target.http.post(CHAT, content=b"{", headers=bearer(key))
        if answer.status_code == 429:
            break
    assert answer.json()["error"]["code"] == "rate_limit_exceeded", answer.text
    assert answer.headers["retry-after"].isdigit()
    return f"429 after {limit} a minute, Retry-After {answer.headers['retry-after']}"


async def busy(target: Target) -> str:
    target.own()
    found = await asyncio.gather(*(target.ask(tokens=400) for _ in range(8)))
    statuses = sorted(answer.status_code for answer in found)
    refused = [answer for answer in found if answer.status_code == 429]
    assert refused, f"8 requests for 3 places: {statuses}"
    assert 200 in statuses, statuses
    assert {answer.json()["error"]["code"] for answer in refused} == {"server_busy"}, refused[0].text
    assert all(answer.headers["retry-after"].isdigit() for answer in refused)
    return f"{len(refused)} of 8 refused at once with Retry-After, {statuses.count(200)} answered"


async def shedding(target: Target) -> str:
    lmx = target.own()
    (lmx.home / "lmx.toml").write_text("[memory]\nshed = 0.0001\n")
    await reload(target)
    answer = await settled(target, 503, "load_shedding")
    assert answer.headers["retry-after"].isdigit()
    assert (await target.http.get("/healthz")).status_code == 200
    (lmx.home / "lmx.toml").write_text("")
    await reload(target)
    await settled(target, 200)
    return "503 with Retry-After while memory is short, 200 afterwards"


async def reload(target: Target) -> None:
    """Have the configuration read again, and wait until the next gateway serves alone: it is asked the next thing."""
    lmx = target.own()
    before = (lmx.status() or {})["gateway"]["pid"]
    done = await target.http.post("/admin/config/reload", headers=bearer(target.admin))
    assert done.status_code == 200, done.text

    def replaced(document: dict[str, Any]) -> bool:
        gateway = document["gateway"]
        return gateway is not None and gateway["state"] == "ready" and gateway["pid"] != before

    await asyncio.to_thread(lmx.wait_status, replaced)
    await asyncio.to_thread(lmx.wait_event, "process_exited", pid=before)


async def settled(target: Target, status: int, code: str = "") -> httpx.Response:
    """Ask until the answer is as it should be: the gateway that hands over answers otherwise, or not at all."""
    last = "no answer"
    async for _ in trying():
        with contextlib.suppress(httpx.HTTPError):
            answer = await target.ask()
            last = answer.text
            if answer.status_code == status and (not code or answer.json()["error"]["code"] == code):
                return answer
    raise AssertionError(f"not {status} {code}: {last}")


async def failover(target: Target) -> str:
    target.may_harm()
    before = await model_of(target)
    text, killed = "", False
    async with target.http.stream(
        "POST", CHAT, json=target.body(600, stream=True), headers=bearer(target.key)
    ) as stream:
        assert stream.status_code == 200, await stream.aread()
        async for line in stream.aiter_lines():
            text = line or text
            if not killed and "content" in line:
                killed = True
                if target.lmx is not None:
                    os.kill(before["pid"], signal.SIGABRT)
                else:
                    order = {"model": target.model, "force": True, "wait": False}
                    told = await target.http.post("/admin/models/restart", json=order, headers=bearer(target.admin))
                    assert told.status_code in {200, 202}, told.text
                assert (await target.http.get("/healthz")).status_code == 200
    assert killed, "no token came"
    assert text == "data: [DONE]", f"the stream ended with {text[:200]}"
    async for _ in trying():
        now = await model_of(target)
        if now["state"] == "ready" and now["pid"] != before["pid"]:
            assert (await target.ask()).status_code == 200
            return f"the stream went on, {before['pid']} is now {now['pid']}"
    raise AssertionError(f"the model did not come back: {now['state']}")


async def journal(target: Target) -> str:
    wanted = {"model_readiness_changed"} | ({"process_exited"} if target.lmx is not None else set())
    wanted |= {"admin_action"} if target.lmx is not None else set()
    seen: set[str] = set()
    with contextlib.suppress(TimeoutError):
        async with (
            asyncio.timeout(PATIENCE_S / 4),
            target.http.stream("GET", "/admin/events?last=1000", headers=bearer(target.admin)) as stream,
        ):
            assert stream.status_code == 200, await stream.aread()
            async for line in stream.aiter_lines():
                if line.startswith("data:"):
                    seen.add(json.loads(line.removeprefix("data:"))["event"])
                if wanted <= seen:
                    break
    assert wanted <= seen, f"not in the journal: {', '.join(sorted(wanted - seen))}"
    return ", ".join(sorted(wanted))


async def revocation(target: Target) -> str:
    lmx = target.own()
    key = lmx.cli("keys", "create", "--name", "leaver").stdout.strip()
    before = (await target.get("/v1/models", key)).status_code
    lmx.cli("keys", "revoke", "leaver")
    after = (await target.get("/v1/models", key)).status_code
    assert (before, after) == (200, 401)
    text = (lmx.home / "state" / "events.jsonl").read_text()
    assert "key_revoked" in text
    assert key not in text
    return "200, then 401; who did it is in the journal"


Check = Callable[[Target], Awaitable[str]]
#: In this order: later ones look for what earlier ones left.
CHECKS: Final[tuple[tuple[str, Check], ...]] = (
    ("health", health),
    ("admin auth", admin_auth),
    ("inference auth", inference_auth),
    ("answers", answers),
    ("request id", request_id),
    ("audit row", audit),
    ("throttling", throttling),
    ("all slots taken", busy),
    ("failover", failover),
    ("load shedding", shedding),
    ("key revocation", revocation),
    ("journal", journal),
)


async def model_of(target: Target) -> dict[str, Any]:
    status = (await target.get("/admin/status")).json()
    found: dict[str, Any] = next(model for model in status["models"] if model["id"] == target.model)
    return found


async def trying() -> AsyncIterator[None]:
    """Yield again and again until the patience is over."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        yield
        await asyncio.sleep(0.1)


async def run(target: Target) -> bool:
    """Make every check, print the table, and return whether none failed."""
    fine = True
    try:
        if not target.model:
            listed = await target.get("/v1/models", target.key or target.admin)
            serving = [model["id"] for model in listed.json().get("data", []) if model.get("state") == "ready"]
            if not serving:
                print(f"smoke: no model is ready at {target.url} ({listed.status_code}): load one", file=sys.stderr)
                return False
            target.model = serving[0]
        print(f"{'check':<18}{'result':<8}details")
        counted: Counter[str] = Counter()
        for name, check in CHECKS:
            try:
                result, details = "ok", await check(target)
            except Skip as why:
                result, details = "skipped", str(why)
            except (AssertionError, httpx.HTTPError, KeyError, ValueError) as error:
                result, details, fine = "FAILED", f"{type(error).__name__}: {error}".splitlines()[0], False
            counted[result] += 1
            print(f"{name:<18}{result:<8}{details}", flush=True)
        print(", ".join(f"{number} {result}" for result, number in sorted(counted.items())), file=sys.stderr)
    finally:
        await target.http.aclose()
    return fine


@contextlib.contextmanager
def own_instance() -> Iterator[Target]:
    """Start an LMX with a tiny model in a temporary home."""
    with tempfile.TemporaryDirectory(prefix="lmx-smoke-", dir="/tmp") as folder:
        model = make_tiny_model(Path(folder) / "tiny")
        lmx = Lmx(**SETTINGS)
        try:
            lmx.start()
            lmx.load(model, "tiny")
            key = lmx.cli("keys", "create", "--name", "smoke").stdout.strip()
            admin = (lmx.home / "admin.key").read_text().strip()
            target = Target(lmx.url, admin, key, lmx=lmx, destructive=True)
            target.model = "tiny"
            yield target
        finally:
            lmx.close()


@click.command()
@click.option("--url", help="A running LMX, as http://127.0.0.1:1234 [one of its own].")
@click.option("--admin-key", envvar="LMX_ADMIN_KEY", default="", help="Its admin key [$LMX_ADMIN_KEY].")
@click.option("--key", default="", help="A key for inference, where one is needed [the admin key].")
@click.option("--model", default="", help="A model it serves [the first that is ready].")
@click.option("--destructive", is_flag=True, help="May use up limits and replace a model's process.")
def main(url: str | None, admin_key: str, key: str, model: str, destructive: bool) -> None:
    """Run the production smoke list; exit 1 if a line fails."""
    if url is None:
        with own_instance() as target:
            fine = asyncio.run(run(target))
    else:
        target = Target(url.rstrip("/"), admin_key, key or admin_key, lmx=None, destructive=destructive)
        target.model = model
        fine = asyncio.run(run(target))
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
