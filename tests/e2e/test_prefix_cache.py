"""The prefix cache of a real LMX: the same answers, true numbers, and warm again after a crash or a reload."""

import asyncio
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness import Lmx, chat, deadline, read_stream

WAIT_S = 90.0
LONG = "Once upon a time there was a river. " * 30
OTHER = "What did people find near the water, and how long did it take them? " * 25


def cached(usage: dict[str, Any]) -> int:
    details = usage["prompt_tokens_details"]
    assert 0 <= details["cached_tokens"] <= usage["prompt_tokens"]
    return int(details["cached_tokens"])


async def whole(http: httpx.AsyncClient, text: str = LONG, tokens: int = 8, **more: Any) -> tuple[str, int]:
    """Return the text of an answer, and how much of its prompt was cached."""
    answer = await http.post("/v1/chat/completions", json=chat("m", max_tokens=tokens, stream=False, text=text, **more))
    assert answer.status_code == 200, answer.text
    document = answer.json()
    return document["choices"][0]["message"]["content"], cached(document["usage"])


def written(lmx: Lmx, least: int) -> list[Path]:
    """Return the files of prefixes once there are so many."""
    for _ in deadline(WAIT_S):
        found = list((lmx.home / "cache").glob("*/*/*.kv"))
        if len(found) >= least:
            return found
    raise AssertionError("nothing was written")


async def test_a_prefix_is_reused_in_every_kind_of_answer(new_lmx: Callable[..., Lmx], tiny_model: Path) -> None:
    lmx = new_lmx().start()
    lmx.load(tiny_model, "m")
    async with httpx.AsyncClient(base_url=lmx.url, timeout=WAIT_S) as http:
        cold, none = await whole(http)
        assert none == 0
        warm, some = await whole(http)
        assert (warm, some >= 128) == (cold, True)
        stream = await read_stream(
            http, chat("m", max_tokens=8, stream=True, text=LONG, stream_options={"include_usage": True})
        )
        assert (stream.text, cached(stream.chunks[-1]["usage"])) == (cold, some)
        _, of_two = await whole(http, n=2)
        assert of_two >= some - 64, "counted once, also for several choices"
        completion = {"model": "m", "prompt": LONG, "max_tokens": 8, "temperature": 0}
        raw = [(await http.post("/v1/completions", json=completion)).json() for _ in range(2)]
        assert raw[0]["choices"][0]["text"] == raw[1]["choices"][0]["text"]
        assert cached(raw[1]["usage"]) >= 128


async def test_a_model_comes_back_warm_after_sigabrt_and_after_a_reload(
    new_lmx: Callable[..., Lmx], tiny_model: Path
) -> None:
    lmx = new_lmx().start()
    lmx.load(tiny_model, "m")
    async with httpx.AsyncClient(base_url=lmx.url, timeout=WAIT_S) as http:
        cold, none = await whole(http)
        files = written(lmx, 2)
        for path in (lmx.home / "cache", *files):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        assert LONG.encode()[:16] not in files[0].read_bytes()
        old = int(lmx.model("m")["incarnation"])
        os.kill(lmx.wait_model("m"), signal.SIGABRT)
        lmx.wait_model("m", other_than=old)
        warm, some = await whole(http)
        assert (none, warm, some >= 128) == (0, cold, True)
        other, none = await whole(http, OTHER)
        assert none == 0
        lmx.cli("restart-worker", "m")
        text, some = await whole(http, OTHER)
        assert (text, some >= 128) == (other, True)


async def test_with_isolation_keys_share_no_prefix(new_lmx: Callable[..., Lmx], tiny_model: Path) -> None:
    lmx = new_lmx(LMX_SECURITY__ISOLATE_PREFIXES="true").start()
    lmx.load(tiny_model, "m")
    keys = [lmx.cli("keys", "create", "--name", name).stdout.split()[-1] for name in ("ada", "bob")]
    assert all(key.startswith("lmx-") for key in keys)
    async with httpx.AsyncClient(base_url=lmx.url, timeout=WAIT_S) as http:
        found = []
        for key in (*keys, keys[0], ""):
            http.headers["Authorization"] = f"Bearer {key}" if key else ""
            found.append((await whole(http))[1])
    assert found[:2] == [0, 0]
    assert found[2] >= 128
    assert found[3] == 0
    for file in written(lmx, 15):  # more than two of them have; a temporary file goes while one looks
        data = file.read_bytes()
        assert not any(key.encode() in data for key in keys)


async def test_switched_off_nothing_is_kept_anywhere(new_lmx: Callable[..., Lmx], tiny_model: Path) -> None:
    lmx = new_lmx(LMX_PREFIX__ENABLED="false").start()
    lmx.load(tiny_model, "m")
    async with httpx.AsyncClient(base_url=lmx.url, timeout=WAIT_S) as http:
        assert [(await whole(http))[1] for _ in range(2)] == [0, 0]
    assert list((lmx.home / "cache").iterdir()) == []


@pytest.mark.real_model
async def test_the_default_model_says_the_same_with_a_prefix_alone_in_a_batch_and_after_a_crash(
    new_lmx: Callable[..., Lmx], real_model: Path
) -> None:
    lmx = new_lmx().start()
    lmx.load(real_model, "m")
    # Short: on a busy machine this model takes a second for a dozen tokens.
    prompts = [LONG[:300] + "Go on.", OTHER[:300] + "Answer."]
    async with httpx.AsyncClient(base_url=lmx.url, timeout=WAIT_S) as http:
        cold = [await whole(http, prompt) for prompt in prompts]
        # They all begin with the template's system message, which is shorter than a block.
        assert [some for _, some in cold] == [0, 0]
        warm = [await whole(http, prompt) for prompt in prompts]
        assert [text for text, _ in warm] == [text for text, _ in cold]
        assert all(some >= 64 for _, some in warm)
        together = await asyncio.gather(*[whole(http, prompt) for prompt in prompts * 2])
        assert [text for text, _ in together] == [text for text, _ in cold] * 2
        written(lmx, 2)
        old = int(lmx.model("m")["incarnation"])
        os.kill(lmx.wait_model("m"), signal.SIGABRT)
        lmx.wait_model("m", other_than=old)
        again = await whole(http, prompts[0])
        assert (again[0], again[1] >= 64) == (cold[0][0], True)
