"""Admission with real processes: memory promised before the prompt, slots that follow the machine's memory."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.chaos.clients import Call
from tests.chaos.test_rows_gateway import patched
from tests.chaos.test_rows_memory import AVAILABLE_PATCH
from tests.fault.pipe import Pipe
from tests.harness import Lmx, chat, deadline

#: Tokens of cache that all requests of the model have together.
TOKENS = 768
#: An answer beside which no other has room.
LONG = 500
SETTINGS = {
    "LMX_MEMORY__SHED": "2",
    "LMX_MEMORY__CRITICAL": "2",
    "LMX_MEMORY__SLOW": "2",
    "LMX_MEMORY__KV_TOKENS": str(TOKENS),
    # Nothing is left for caches but what was reserved for them when the model was loaded.
    "LMX_MEMORY__BUFFER_BYTES": str(2 * 1024**3),
    "LMX_MODELS__SLOT_TIMEOUT_S": "0.4",
    "LMX_LIFECYCLE__HEARTBEAT_S": "0.2",
}
#: The engine stands still while a file is there: what runs goes on for as long as a test needs it.
HOLD_PATCH = """
import os, time
from worker.engine import Engine
real = Engine._step
def step(self):
    while os.path.exists(f"{HERE}/hold"):
        time.sleep(0.005)
    real(self)
Engine._step = step
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("admission") / "site"


@pytest.fixture(scope="module")
def small(tiny_model: Path, site: Path) -> Iterator[Lmx]:
    lmx = Lmx(**SETTINGS, **patched(site, worker=HOLD_PATCH))
    try:
        lmx.start()
        lmx.load(tiny_model, "tiny")
        yield lmx
    finally:
        lmx.close()


@pytest.fixture
def body(tiny_model: Path) -> Callable[..., dict[str, Any]]:
    eos = json.loads((tiny_model / "config.json").read_text())["eos_token_id"]
    return lambda max_tokens, **more: chat(
        "tiny", max_tokens=max_tokens, stream=True, logit_bias={str(eos): -100}, **more
    )


@pytest.fixture
def ask(small: Lmx, body: Callable[..., dict[str, Any]]) -> Callable[..., Call]:
    return lambda max_tokens, **more: Call(small.url, body(max_tokens, **more), {})


@pytest.fixture
def held(site: Path) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Has the engine of `small` stand still while the block runs."""

    @contextlib.contextmanager
    def holding() -> Iterator[None]:
        (site / "hold").touch()
        try:
            yield
        finally:
            (site / "hold").unlink()

    return holding


@pytest.fixture
def steps(tmp_path: Path) -> Iterator[Pipe]:
    with Pipe(tmp_path / "steps") as pipe:
        yield pipe


def test_what_never_fits_is_a_400_that_says_what_it_needs_and_what_there_is(
    small: Lmx, ask: Callable[..., Call]
) -> None:
    model = small.model("tiny")
    assert model["kv_limit_bytes"] % (TOKENS * 4) == 0
    call = ask(TOKENS).wait()
    assert (call.status, call.code, call.error["param"]) == (400, "request_too_large", "max_tokens")
    assert f"for {TOKENS} tokens" in call.error["message"]
    assert "retry-after" not in call.headers
    # Nobody asked for a length: the answer ends where the memory does.
    body = {key: value for key, value in chat("tiny", max_tokens=1, stream=False).items() if key != "max_tokens"}
    whole = httpx.post(f"{small.url}/v1/chat/completions", json=body, timeout=60).json()
    assert whole["usage"]["total_tokens"] <= TOKENS


def test_what_does_not_fit_now_waits_and_is_then_429_before_any_byte_of_a_stream(
    ask: Callable[..., Call], held: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    with held():
        first = ask(LONG)
        for _ in deadline(30):  # its head is sent when it has its memory
            if first.status:
                break
        late = ask(LONG).wait()
    assert (late.status, late.code, late.headers["retry-after"]) == (429, "server_busy", "5")
    assert late.headers["content-type"].startswith("application/json")
    assert "memory for its cache" in late.error["message"]
    assert first.wait().whole
    assert ask(LONG).wait().whole


def test_what_leaves_gives_its_memory_back(
    small: Lmx,
    ask: Callable[..., Call],
    body: Callable[..., dict[str, Any]],
    held: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    with (
        held(),
        httpx.Client(timeout=30) as http,
        http.stream("POST", f"{small.url}/v1/chat/completions", json=body(LONG)) as stream,
    ):
        next(stream.iter_bytes())
        small.wait_status(lambda doc: doc["models"][0]["kv_reserved_bytes"] > 0)
    small.wait_status(lambda doc: doc["models"][0]["kv_reserved_bytes"] == 0)
    assert ask(LONG).wait().whole, "there is no memory for two of them"
    # Each of several answers has a cache of its own.
    three = ask(100, n=3).wait()
    assert three.whole
    small.wait_status(lambda doc: doc["models"][0]["kv_reserved_bytes"] == 0)
    with held():
        assert ask(LONG, n=2).wait().code == "server_busy"


def test_fewer_requests_run_at_once_while_the_machine_is_short_of_memory(
    new_lmx: Callable[..., Lmx], tiny_model: Path, tmp_path: Path, steps: Pipe
) -> None:
    site = tmp_path / "site"
    total = psutil.virtual_memory().total
    fault = json.dumps({"step_pipe": str(steps.file), "answer_tokens": 1000})
    settings = {"LMX_MODELS__MAX_CONCURRENT_REQUESTS": "8", "LMX_WORKER__MODULE": "tests.fault", "LMX_FAULT": fault}
    site_settings = patched(site, supervisor=AVAILABLE_PATCH)
    (site / "available").write_text(str(total // 2))
    lmx = new_lmx(**settings, **site_settings, LMX_MEMORY__SLOW="0.8").start()
    lmx.load(tiny_model, "counts")
    assert lmx.model("counts")["concurrent_limit"] == 8
    (site / "available").write_text(str(int(total * 0.055)))  # nearly full: one of eight slots
    short = lmx.wait_status(lambda doc: doc["models"][0]["concurrent_limit"] == 1)
    assert short["memory"]["concurrency_share"] == 0.125
    calls = [Call(lmx.url, chat("counts", max_tokens=150, stream=True), {}) for _ in range(2)]
    lmx.wait_status(lambda doc: (doc["models"][0]["running"], doc["models"][0]["waiting"]) == (1, 1))
    (site / "available").write_text(str(total // 2))
    lmx.wait_status(lambda doc: doc["models"][0]["concurrent_limit"] >= 2, within_s=20)
    lmx.wait_status(lambda doc: (doc["models"][0]["running"], doc["models"][0]["waiting"]) == (2, 0))
    steps.close()  # from now on the engine steps as fast as it can
    for call in calls:
        assert call.wait().whole
    lmx.wait_status(lambda doc: doc["models"][0]["concurrent_limit"] == 8, within_s=40)


async def test_a_polite_client_gets_its_turn_beside_a_hundred_requests_of_a_greedy_one(
    new_lmx: Callable[..., Lmx], tiny_model: Path, steps: Pipe
) -> None:
    settings = {
        "LMX_MODELS__MAX_CONCURRENT_REQUESTS": "2",
        "LMX_WORKER__MODULE": "tests.fault",
        "LMX_FAULT": json.dumps({"step_pipe": str(steps.file), "answer_tokens": 1000}),
        "LMX_LIFECYCLE__HEARTBEAT_S": "0.2",
    }
    lmx = new_lmx(**settings).start()
    lmx.load(tiny_model, "counts")
    keys = {}
    for name, more in (("greedy", ()), ("polite", ()), ("vip", ("--priority", "5"))):
        keys[name] = json.loads(lmx.cli("keys", "create", "--name", name, "--json", *more).stdout)["key"]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=lmx.url, timeout=60, limits=limits) as http:

        async def ask(name: str, **headers: str) -> int:
            body = chat("counts", max_tokens=20, stream=False)
            headers["Authorization"] = f"Bearer {keys[name]}"
            return (await http.post("/v1/chat/completions", json=body, headers=headers)).status_code

        def waiting(count: int) -> Callable[[dict[str, Any]], bool]:
            return lambda doc: (doc["models"][0]["running"], doc["models"][0]["waiting"]) == (2, count)

        greedy = [asyncio.create_task(ask("greedy")) for _ in range(100)]
        await asyncio.to_thread(lmx.wait_status, waiting(98))
        assert await ask("greedy", **{"X-LMX-Priority": "high"}) == 403
        others = asyncio.gather(ask("polite"), ask("vip", **{"X-LMX-Priority": "high"}))
        await asyncio.to_thread(lmx.wait_status, waiting(100))
        # What runs has to end, and each slot may go to another once before theirs: time for no more answers than that,
        # of 20 tokens and a prompt each. Their turn comes, not their place in one line.
        steps.let(4 * 21)
        assert await asyncio.wait_for(others, 60) == [200, 200]
        for task in greedy:
            task.cancel()
        await asyncio.gather(*greedy, return_exceptions=True)
    steps.close()  # nothing holds the engine any more
