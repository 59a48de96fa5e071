"""A crash that a client does not see: real processes, signals and MLX; the text is that of an uninterrupted run."""

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.fault.pipe import Pipe
from tests.harness import Lmx, Stream, chat, read_stream, without_cached

#: Kills in a row are the point here, so they are no crash loop.
PATIENT = {
    "LMX_LIFECYCLE__BURST_FAILURES": "1000",
    "LMX_LIFECYCLE__SLOW_FAILURES": "1000",
    "LMX_LIFECYCLE__DEGRADED_FROM_TRY": "1000",
    "LMX_LIFECYCLE__BREAKER_FAILURES": "1000",
    "LMX_LIFECYCLE__STABLE_S": "0.05",
    "LMX_GATEWAY__KEEPALIVE_S": "0.2",
    # A chunk per token: they are what is counted here.
    "LMX_MODELS__GATHER_S": "0",
}
FAULT = {**PATIENT, "LMX_WORKER__MODULE": "tests.fault"}
WAIT_S = 90


def client(lmx: Lmx, **headers: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=lmx.url, timeout=WAIT_S, limits=limits, headers=headers)


def request(number: int, *, stream: bool = True, max_tokens: int = 400, **more: Any) -> dict[str, Any]:
    if stream:
        more["stream_options"] = {"include_usage": True}
    return chat("alpha", max_tokens=max_tokens, stream=stream, text=f"Tell me story number {number}", **more)


def usage(stream: Stream) -> dict[str, Any]:
    (found,) = [chunk["usage"] for chunk in stream.chunks if not chunk["choices"]]
    return without_cached(found)


async def killed_at(
    lmx: Lmx, http: httpx.AsyncClient, bodies: list[dict[str, Any]], chunks: int, number: signal.Signals
) -> list[Stream]:
    """Run streams side by side and send a signal to their model once each has so many chunks."""
    there: set[int] = set()
    ready = asyncio.Event()

    def note(stream: Stream) -> None:
        # A busy machine puts several tokens into a chunk, and one may come to its end before the others get there.
        if len(stream.chunks) >= chunks or stream.finish is not None:
            there.add(id(stream))
        if len(there) == len(bodies):
            ready.set()

    tasks = [asyncio.create_task(read_stream(http, body, note)) for body in bodies]
    await asyncio.wait_for(ready.wait(), WAIT_S)
    os.kill(lmx.model("alpha")["pid"], number)
    return await asyncio.wait_for(asyncio.gather(*tasks), WAIT_S)


def check_same(streams: list[Stream], references: list[Stream]) -> None:
    for stream, reference in zip(streams, references, strict=True):
        assert (stream.error, stream.broken, stream.done) == (None, "", True)
        assert (stream.text, stream.finish) == (reference.text, reference.finish)
        assert usage(stream) == usage(reference)
        assert len({(chunk["id"], chunk["created"]) for chunk in stream.chunks}) == 1
        assert sum("role" in c["choices"][0]["delta"] for c in stream.chunks if c["choices"]) == 1


@pytest.mark.parametrize(
    ("gather_s", "moments"), [("0", (2, 40, 111)), ("0.008", (2, 10, 25))], ids=["token_by_token", "gathered"]
)
async def test_eight_streams_cross_a_crash_unseen(
    new_lmx: Callable[..., Lmx], tiny_model: Path, gather_s: str, moments: tuple[int, ...]
) -> None:
    lmx = new_lmx(**{**PATIENT, "LMX_MODELS__GATHER_S": gather_s}).start()
    lmx.load(tiny_model, "alpha")
    bodies = [request(number) for number in range(8)]
    async with client(lmx) as http:
        references = await asyncio.gather(*(read_stream(http, body) for body in bodies))
        assert len({reference.text for reference in references}) == 8
        for chunks, number in zip(moments, (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV), strict=True):
            check_same(await killed_at(lmx, http, bodies, chunks, number), references)
            assert (await http.get("/healthz")).status_code == 200
    # If all had come to their end before the signal, nobody has waited for the restart yet.
    lmx.wait_status(lambda doc: doc["models"][0]["restarts"] == 3)


async def test_whole_answers_and_seeded_ones_cross_it_too(new_lmx: Callable[..., Lmx], tiny_model: Path) -> None:
    lmx = new_lmx(**PATIENT).start()
    lmx.load(tiny_model, "alpha")
    seeded = [request(number, temperature=0.9, top_p=0.9, seed=number) for number in range(4)]
    whole = [request(number, stream=False) for number in range(3)]

    async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[Any, ...]:
        answer = (await http.post("/v1/chat/completions", json=body)).json()
        (choice,) = answer["choices"]
        return choice["message"]["content"], choice["finish_reason"], without_cached(answer["usage"])

    async with client(lmx) as http:
        references = await asyncio.gather(*(read_stream(http, body) for body in seeded))
        expected = [await ask(http, body) for body in whole]
        asking = [asyncio.create_task(ask(http, body)) for body in whole]
        check_same(await killed_at(lmx, http, seeded, 60, signal.SIGKILL), references)
        assert await asyncio.gather(*asking) == expected
    lmx.wait_status(lambda doc: doc["models"][0]["restarts"] == 1)


async def test_stop_strings_and_lengths_are_met_across_the_seam(new_lmx: Callable[..., Lmx], tiny_model: Path) -> None:
    """The process dies while part of the stop string is held back, or just before the last token."""
    lmx = new_lmx(**PATIENT).start()
    lmx.load(tiny_model, "alpha")
    async with client(lmx) as http:
        plain = await read_stream(http, request(1, max_tokens=120))
        middle = plain.text[len(plain.text) // 2 :]
        stop = middle[: len(middle) // 2]  # long: it is held back over many tokens
        bodies = [request(1, max_tokens=120, stop=[stop]), request(1, max_tokens=60)]
        references = [await read_stream(http, body) for body in bodies]
        assert references[0].finish == "stop"
        assert references[0].text == plain.text.partition(stop)[0]
        for chunks in (12, 25, 40):
            check_same(await killed_at(lmx, http, bodies, chunks, signal.SIGKILL), references)


@pytest.mark.real_model
@pytest.mark.slow
async def test_the_default_model_crosses_it_too(new_lmx: Callable[..., Lmx], real_model: Path) -> None:
    """A real tokenizer: characters of several tokens, and an answer that ends by itself."""
    lmx = new_lmx(**PATIENT).start()
    lmx.load(real_model, "alpha")
    asked = [
        "Repeat exactly: 日本語 😀 naïve Zürich 😀😀😀",
        "What is the capital of France?",
        "Count from 1 to 30.",
    ]
    bodies = [
        chat("alpha", max_tokens=32, stream=True, text=text, stream_options={"include_usage": True}) for text in asked
    ]
    async with client(lmx) as http:
        references = [await read_stream(http, body) for body in bodies]
        assert any(not reference.text.isascii() for reference in references)
        check_same(await killed_at(lmx, http, bodies, 4, signal.SIGKILL), references)


async def test_openai_and_a_client_that_leaves(new_lmx: Callable[..., Lmx], tiny_model: Path) -> None:
    lmx = new_lmx(**PATIENT).start()
    lmx.load(tiny_model, "alpha")
    sdk = openai.AsyncOpenAI(base_url=f"{lmx.url}/v1", api_key="unused", max_retries=0)
    async with sdk, client(lmx) as http:
        reference = await read_stream(http, request(3))
        leaving = asyncio.create_task(read_stream(http, request(4, max_tokens=6000)))
        stream = await sdk.chat.completions.create(
            model="alpha",
            messages=[{"role": "user", "content": "Tell me story number 3"}],
            temperature=0,
            max_tokens=400,
            stream=True,
        )
        text, finish, killed = "", None, False
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            finish = chunk.choices[0].finish_reason or finish
            if not killed and len(text) > len(reference.text) // 3:
                killed = True
                psutil.Process(lmx.model("alpha")["pid"]).kill()
                leaving.cancel()
        assert (text, finish) == (reference.text, reference.finish)
    lmx.wait_status(lambda doc: doc["models"][0]["running"] == 0)  # the one that left holds no slot


async def test_a_poison_is_found_in_two_crashes_and_the_innocents_finish(
    new_lmx: Callable[..., Lmx], tiny_model: Path
) -> None:
    lmx = new_lmx(**FAULT, LMX_FAULT='{"tokens_per_s": 100}').start()
    lmx.load(tiny_model, "alpha")
    poison = chat("alpha", max_tokens=200, stream=True, text="[[abort 20]]")
    innocents = [request(number, max_tokens=200, user=f"u{number}") for number in range(7)]
    for number, body in enumerate(innocents):
        body["messages"][0]["content"] = f"[[tokens {100 + number}]]"
    async with client(lmx) as http:
        tasks = [asyncio.create_task(read_stream(http, body)) for body in (*innocents, poison)]
        *good, bad = await asyncio.wait_for(asyncio.gather(*tasks), WAIT_S)
        for number, stream in enumerate(good):
            assert (stream.error, stream.done) == (None, True)
            tokens = 100 + number
            assert stream.text == "".join(f"tok{token} " for token in range(tokens))
            assert usage(stream)["completion_tokens"] == tokens + 1
        assert bad.error is not None
        assert (bad.error["code"], bad.done) == ("request_quarantined", False)
        # What a dying process has not sent is lost with it.
        assert "".join(f"tok{token} " for token in range(20)).startswith(bad.text)
        assert bad.text.startswith("tok0 tok1 ")
        refused = await http.post("/v1/chat/completions", json=poison)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "request_quarantined")
        # Another one on its own: whole, and before its first token.
        answer = await http.post(
            "/v1/chat/completions", json=chat("alpha", max_tokens=9, stream=False, text="[[segv]]")
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "request_quarantined")
        # And one that ends the IO thread before anything is accepted.
        answer = await http.post("/v1/chat/completions", json=chat("alpha", max_tokens=9, stream=False, text="[[io]]"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "request_quarantined")
    lmx.wait_status(lambda doc: doc["models"][0]["restarts"] == 6)
    assert "[[" not in (lmx.home / "logs" / "gateway.log").read_text()


async def test_an_exception_in_the_engine_is_a_crash_with_last_words(
    new_lmx: Callable[..., Lmx], tiny_model: Path
) -> None:
    lmx = new_lmx(**FAULT).start()
    lmx.load(tiny_model, "alpha")
    async with client(lmx) as http:
        poison, innocent = await asyncio.wait_for(
            asyncio.gather(
                read_stream(http, chat("alpha", max_tokens=99, stream=True, text="[[raise 5]]")),
                read_stream(http, chat("alpha", max_tokens=300, stream=True, text="[[tokens 200]]")),
            ),
            WAIT_S,
        )
    assert poison.error is not None
    assert poison.error["code"] == "request_quarantined"
    assert (innocent.error, innocent.text) == (None, "".join(f"tok{token} " for token in range(200)))
    assert lmx.model("alpha")["restarts"] == 2


async def test_a_restart_by_hand_that_cannot_wait_is_not_seen_either(
    new_lmx: Callable[..., Lmx], tiny_model: Path, tmp_path: Path
) -> None:
    """The drain is over before the stream is: it is given back, and goes on in the next process."""
    started = asyncio.Event()
    with Pipe(tmp_path / "steps") as steps:
        fault = json.dumps({"step_pipe": str(steps.file)})
        lmx = new_lmx(**FAULT, LMX_LIFECYCLE__DRAIN_S="0.3", LMX_FAULT=fault).start()
        lmx.load(tiny_model, "alpha")

        async def step() -> None:
            for _ in range(400):  # never to its end
                steps.let()
                await asyncio.sleep(0.01)

        async with client(lmx) as http:
            body = chat("alpha", max_tokens=600, stream=True, text="[[tokens 500]]")
            reading = asyncio.create_task(read_stream(http, body, lambda _: started.set()))
            stepping = asyncio.create_task(step())
            await asyncio.wait_for(started.wait(), WAIT_S)
            await asyncio.to_thread(lmx.cli, "restart-worker", "alpha")
            stepping.cancel()
            steps.close()  # from now on it goes as fast as it can
            result = await asyncio.wait_for(reading, WAIT_S)
    assert (result.error, result.done) == (None, True)
    assert result.text == "".join(f"tok{token} " for token in range(500))
    assert lmx.model("alpha")["restarts"] == 1


async def test_an_idle_model_generates_a_token_now_and_then(new_lmx: Callable[..., Lmx], tiny_model: Path) -> None:
    """One that dies of it is replaced before anyone asks; the first one of each process is not counted as idle."""
    lmx = new_lmx(
        **FAULT, LMX_LIFECYCLE__CANARY_IDLE_S="0.2", LMX_FAULT='{"at": "idle", "deed": "exit", "until_incarnation": 2}'
    ).start()
    lmx.load(tiny_model, "alpha")
    exited = lmx.wait_event("process_exited", model="alpha")
    assert exited["code"] == 70
    lmx.wait_model("alpha", other_than=exited.get("incarnation", 0))
    async with client(lmx) as http:
        assert (await read_stream(http, chat("alpha", max_tokens=5, stream=True))).done
