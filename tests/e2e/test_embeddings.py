"""Embeddings through a whole LMX: the built-in model by its name, and a worker that is killed under load."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.encoderkit import Reference
from tests.harness import Lmx, Stream, chat, read_stream
from tests.modelkit import make_tiny_encoder


def embed(client: httpx.Client, **body: Any) -> Any:
    answer = client.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    return np.array([item["embedding"] for item in answer.json()["data"]])


async def test_a_killed_embedding_worker_costs_others_nothing_and_its_own_a_pause(
    new_lmx: Callable[..., Lmx], tiny_model: Path, tmp_path: Path
) -> None:
    folder = make_tiny_encoder(tmp_path / "encoder")
    # Small steps and many heartbeats, so that the requests are still under way when one has told of them.
    lmx = new_lmx(LMX_MODELS__PREFILL_STEP_TOKENS="16", LMX_LIFECYCLE__HEARTBEAT_S="0.2").start()
    lmx.load(tiny_model, "chat")
    lmx.load(folder, "vectors")
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=lmx.url, timeout=100, trust_env=False, limits=limits) as client:
        texts = [f"{word} the sea of time" for word in ("over", "under", "in")]
        body = {"model": "vectors", "input": texts * 200}
        incarnation = lmx.model("vectors")["incarnation"]
        pid = lmx.wait_model("vectors")
        begun = asyncio.Event()

        def on_chunk(stream: Stream) -> None:
            if len(stream.chunks) > 20:
                begun.set()

        streams = [
            asyncio.create_task(read_stream(client, chat("chat", max_tokens=400, stream=True), on_chunk))
            for _ in range(3)
        ]
        await begun.wait()
        asked = [asyncio.create_task(client.post("/v1/embeddings", json=body)) for _ in range(8)]
        await running(lmx, "vectors", 8)
        os.kill(pid, signal.SIGKILL)
        answers = await asyncio.gather(*asked)
        others = await asyncio.gather(*streams)
    assert [answer.status_code for answer in answers] == [200] * 8, answers[0].text[:300]
    reference = Reference(folder)
    wanted = np.array([reference.vector(text) for text in texts])
    for answer in answers:
        got = np.array([item["embedding"] for item in answer.json()["data"]])
        assert got.shape == (600, 32)
        assert np.abs(got.reshape(200, 3, 32) - wanted).max() < 2e-5
    assert [(stream.done, stream.finish, stream.error) for stream in others] == [(True, "length", None)] * 3
    assert lmx.model("vectors")["incarnation"] != incarnation
    assert lmx.model("chat")["restarts"] == 0


async def running(lmx: Lmx, model: str, count: int) -> None:
    """Wait until the worker has taken that many requests."""
    await asyncio.to_thread(
        lmx.wait_status,
        lambda doc: any(entry["id"] == model and (entry["running"] or 0) >= count for entry in doc["models"]),
    )


def test_a_model_is_refused_for_what_it_does_not_do(new_lmx: Callable[..., Lmx], tmp_path: Path) -> None:
    lmx = new_lmx().start()
    lmx.load(make_tiny_encoder(tmp_path / "encoder"), "vectors")
    with httpx.Client(base_url=lmx.url, timeout=60, trust_env=False) as client:
        (card,) = client.get("/v1/models").json()["data"]
        assert card["capabilities"][:2] == ["embedding", "rerank"]
        answer = client.post("/v1/chat/completions", json=chat("vectors", max_tokens=1, stream=False))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
        answer = client.post("/v1/embeddings", json={"model": "vectors", "input": "of " * 30})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert answer.json()["error"]["param"] == "input[0]"
        (vector,) = embed(client, model="vectors", input="the sea")
        assert abs(np.linalg.norm(vector) - 1) < 2e-5


@pytest.mark.real_model
def test_the_builtin_embedding_model_by_its_name(new_lmx: Callable[..., Lmx], embedding_model: Path) -> None:
    lmx = new_lmx()
    (lmx.home / "models").mkdir(exist_ok=True)
    (lmx.home / "models" / embedding_model.name).symlink_to(embedding_model)
    lmx.start()
    lmx.cli("load", "all-minilm-l6-v2")
    texts = ["A man is eating food.", "A man is eating a piece of bread.", "A cheetah runs behind its prey."]
    with openai.OpenAI(base_url=f"{lmx.url}/v1", api_key="unused", max_retries=0) as client:
        answer = client.embeddings.create(model="all-minilm-l6-v2", input=texts)
    got = np.array([item.embedding for item in answer.data])
    assert got.shape == (3, 384)
    assert got[0] @ got[1] > 0.7
    assert got[0] @ got[2] < 0.3
    reference = Reference(embedding_model)
    assert np.abs(got - [reference.vector(text) for text in texts]).max() < 2e-5
    with httpx.Client(base_url=lmx.url, timeout=60, trust_env=False) as plain:
        body = {"model": "all-minilm-l6-v2", "query": texts[0], "documents": texts[:0:-1], "top_n": 1}
        (best,) = plain.post("/rerank", json=body).json()["results"]
        assert best["index"] == 1
        short = embed(plain, model="all-minilm-l6-v2", input=texts, dimensions=128)
        assert np.abs(short - got[:, :128] / np.linalg.norm(got[:, :128], axis=1, keepdims=True)).max() < 2e-5
