"""Several choices, thoughts and tool calls cross a crash like plain text: real processes, no MLX."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec

from tests.fault.plan import FaultPlan
from tests.harness import Lmx, Stream, chat, read_stream

TOKENS = 24
WAIT_S = 90


def dying_once(folder: Path, after_tokens: int) -> str:
    """A worker that ends by SIGKILL after so many tokens of all its answers, the first time."""
    plan = FaultPlan(deed="kill", after_tokens=after_tokens, once=str(folder / "died"), tokens_per_s=100)
    return msgspec.json.encode(plan).decode()


def body(text: str, **more: Any) -> dict[str, Any]:
    return chat("alpha", max_tokens=TOKENS, text=text, **{"stream": True, **more})


def gathered(stream: Stream, index: int) -> tuple[str, str, str]:
    """Return the text, the thoughts and the arguments of the calls of one choice."""
    assert (stream.error, stream.broken, stream.done) == (None, "", True)
    deltas = [c["delta"] for chunk in stream.chunks for c in chunk["choices"] if c["index"] == index]
    assert sum("role" in delta for delta in deltas) == 1
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert sum("id" in call for call in calls) <= 1
    return (
        "".join(delta.get("content", "") for delta in deltas),
        "".join(delta.get("reasoning_content", "") for delta in deltas),
        "".join(call["function"].get("arguments", "") for call in calls),
    )


async def test_choices_thoughts_and_calls_cross_a_crash(
    new_lmx: Callable[..., Lmx], tiny_model: Path, tmp_path: Path
) -> None:
    lmx = new_lmx(LMX_WORKER__MODULE="tests.fault", LMX_FAULT=dying_once(tmp_path, 30)).start()
    lmx.load(tiny_model, "alpha")
    said = [f"tok{number} " for number in range(TOKENS)]
    async with httpx.AsyncClient(base_url=lmx.url, timeout=WAIT_S) as http:
        streams = await asyncio.gather(
            read_stream(http, body("two", n=2)),
            read_stream(http, body("[[think]]")),
            read_stream(http, body("[[call]]", tools=[{"type": "function", "function": {"name": "count"}}])),
        )
        assert (tmp_path / "died").exists()
        whole = (
            await http.post("/v1/completions", json={"model": "alpha", "prompt": ["a", "b"], "max_tokens": 3})
        ).json()
    two, thinking, calling = streams
    assert gathered(two, 0) == gathered(two, 1) == ("".join(said), "", "")
    assert gathered(thinking, 0) == ("".join(said[5:]), "".join(said[:5]), "")
    text, _, arguments = gathered(calling, 0)
    assert (text, json.loads(arguments)) == ("", {"to": "".join(said)})
    assert [choice["text"] for choice in whole["choices"]] == ["tok0 tok1 tok2 "] * 2
    assert lmx.model("alpha")["restarts"] == 1
