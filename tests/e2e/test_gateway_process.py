"""A gateway lives through its supervisors: it starts, drains, is told to stop, is left alone, and goes on serving."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from protocol.config import LifecycleConfig
from protocol.control import Drain, Drained, GatewayHeartbeat, GatewayHello, GatewayReady, Stop
from protocol.data import Finish
from protocol.states import ModelState, WorkerExit
from tests.e2e.gateway_harness import FAIL, PATIENCE_S, ROOT, chunks, error_code, least, stack, text_of, until


async def test_it_introduces_itself_and_reports() -> None:
    async with stack(lifecycle=LifecycleConfig(heartbeat_s=0.05)) as lmx:
        assert lmx.supervisor.listen_fd is not None
        worker = await lmx.start_worker()
        answering = lmx.chat()
        submit = await worker.accept()
        while (beat := await lmx.supervisor.hear(GatewayHeartbeat)).open_requests != 1:
            pass
        assert beat.sockets >= 1
        await worker.step(submit.rid, "x", finish=Finish.STOP)
        await answering
        while (await lmx.supervisor.hear(GatewayHeartbeat)).open_requests != 0:
            pass


async def test_healthz_and_readyz() -> None:
    async with stack() as lmx:
        health = await lmx.client.get("/healthz")
        assert (health.status_code, health.json()) == (200, {"status": "ok", "version": "0.1.0"})
        ready = await lmx.client.get("/readyz")
        assert (ready.status_code, ready.json()["reason"]) == (503, "no models loaded")
        await lmx.start_worker()
        ready = await lmx.client.get("/readyz")
        assert (ready.status_code, ready.json()["models_loaded"]) == (200, 1)
        assert (await lmx.client.head("/healthz")).status_code == 200


async def test_models_come_from_the_catalog_whatever_their_state() -> None:
    async with stack(FAIL) as lmx:
        worker = await lmx.start_worker("org/tiny")
        lmx.supervisor.publish(worker.catalog_model(id="big", state=ModelState.LOADING, capabilities=None))
        await lmx.state("big", ModelState.LOADING)
        listed = (await lmx.client.get("/models/")).json()["data"]
        assert [(m["id"], m["state"], m["max_model_len"], m["capabilities"]) for m in listed] == [
            ("org/tiny", "ready", 2048, ["chat"]),
            ("big", "loading", None, []),
        ]
        for path in ("/v1/models/org/tiny", "/v1/models/org%2Ftiny", "//v1//models//org//tiny/", "/models/org/tiny"):
            assert (await lmx.client.get(path)).json() == listed[0]
        refused = await lmx.client.post(
            "/chat/completions", json={"model": "big", "messages": [{"role": "user", "content": ""}]}
        )
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_loading")
        assert refused.headers["retry-after"] == "5"


async def test_it_serves_without_a_supervisor_and_hands_its_socket_to_the_next() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        streaming = lmx.chat(stream=True)
        submit = await worker.accept()
        await lmx.supervisor.close()
        await worker.step(submit.rid, "a")
        for _ in range(3):
            answering = lmx.chat()
            await worker.answer("still here")
            assert (await answering).status_code == 200
        await worker.step(submit.rid, "b", finish=Finish.STOP)
        assert text_of((await streaming).text) == "ab"

        models = lmx.supervisor.models
        lmx.supervisor = type(lmx.supervisor)(lmx.home / "s.sock", 120)
        lmx.supervisor.models = models
        await lmx.supervisor.hear(GatewayHello)
        await lmx.supervisor.hear(GatewayReady)
        assert lmx.supervisor.listen_fd is not None
        with socket.socket(fileno=os.dup(lmx.supervisor.listen_fd)) as handed:
            assert handed.getsockname()[1] == lmx.gateway.port
            assert handed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        assert lmx.gateway.process.poll() is None


async def test_a_new_supervisor_that_knows_no_models_yet_breaks_no_stream() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        streaming = lmx.chat(stream=True)
        submit = await worker.accept()
        known = worker.catalog_model()
        await lmx.restart_supervisor()
        lmx.supervisor.models = []
        await lmx.supervisor.hear(GatewayReady)
        lmx.supervisor.publish(worker.catalog_model(state=ModelState.STARTING, incarnation=0, endpoint=""))
        await lmx.state("tiny", ModelState.STARTING)
        await worker.step(submit.rid, "a")
        lmx.supervisor.publish(known)
        await lmx.state("tiny", ModelState.READY)
        await worker.step(submit.rid, "b", finish=Finish.STOP)
        assert text_of((await streaming).text) == "ab"


async def test_sigterm_drains_then_exits_0() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        streaming = lmx.chat(stream=True)
        submit = await worker.accept()
        lmx.gateway.process.terminate()
        async with asyncio.timeout(PATIENCE_S):
            while (ready := await lmx.client.get("/readyz")).json().get("reason") != "draining":
                pass
        assert ready.status_code == 503
        assert (await lmx.client.get("/healthz")).status_code == 200
        refused = await lmx.chat()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert refused.headers["retry-after"] == "10"
        await worker.step(submit.rid, "whole", finish=Finish.STOP)
        body = (await streaming).text
        assert (text_of(body), chunks(body)[-1]) == ("whole", "[DONE]")
        assert await lmx.gateway.exit_code() == 0


async def test_what_does_not_finish_within_the_grace_is_failed() -> None:
    async with stack(lifecycle=LifecycleConfig(drain_s=0.05)) as lmx:
        worker = await lmx.start_worker()
        streaming, whole = lmx.chat(stream=True), lmx.chat()
        submits = [await worker.accept(), await worker.accept()]
        lmx.gateway.process.terminate()
        assert error_code(await streaming) == error_code(await whole) == "shutting_down"
        assert submits
        assert await lmx.gateway.exit_code() == 0


async def test_drain_reports_and_waits_for_stop() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        answering = lmx.chat()
        submit = await worker.accept()
        lmx.supervisor.send(Drain(30))
        await until(lambda: httpx.get(f"{lmx.gateway.url}/readyz", trust_env=False).status_code == 503)
        await worker.step(submit.rid, "x", finish=Finish.STOP)
        assert (await answering).status_code == 200
        await lmx.supervisor.hear(Drained)
        assert lmx.gateway.process.poll() is None
        lmx.supervisor.send(Stop("done"))
        assert await lmx.gateway.exit_code() == 0


async def test_stop_ends_at_once() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        streaming = lmx.chat(stream=True)
        await worker.accept()
        lmx.supervisor.send(Stop("now"))
        assert error_code(await streaming) == "shutting_down"
        assert await lmx.gateway.exit_code() == 0


async def test_without_a_supervisor_for_the_lease_it_exits_90() -> None:
    async with stack(lifecycle=LifecycleConfig(heartbeat_s=0.05, drain_s=1)) as lmx:
        await lmx.supervisor.hear(GatewayHeartbeat)
        assert lmx.gateway.process.poll() is None
        await lmx.supervisor.close()
        # Not the first one has so short a lease: it would be over if this process were held up at the start.
        lmx.supervisor = type(lmx.supervisor)(lmx.home / "s.sock", 0.3)
        await lmx.supervisor.hear(GatewayReady)
        await lmx.supervisor.close()
        assert await lmx.gateway.exit_code() == WorkerExit.LEASE_EXPIRED
        lmx.supervisor = type(lmx.supervisor)(lmx.home / "s.sock", 1)


async def test_the_next_gateway_takes_over_waiting_connections() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        lmx.gateway.process.send_signal(signal.SIGKILL)
        lmx.gateway.process.wait()
        # The supervisor holds the listening socket: this connects, and waits.
        answering = lmx.chat()
        lmx.gateway.spawn()
        await worker.answer("from the second")
        assert (await answering).json()["choices"][0]["message"]["content"] == "from the second"


@pytest.mark.parametrize("argument", ["/nonexistent.json", None])
def test_a_bad_spec_is_a_usage_or_configuration_error(argument: str | None) -> None:
    argv = [sys.executable, "-m", "gateway", *([argument] if argument else [])]
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, check=False, text=True)
    assert result.returncode == (WorkerExit.BAD_CONFIG if argument else WorkerExit.USAGE)
    assert result.stderr.startswith("gateway: " if argument else "usage: ")


@pytest.mark.parametrize("content", [b"\xff\xfe", b'{"incarnation": "\xc3', b"[" * 100_000, b"{}", b""])
def test_a_damaged_spec_is_a_configuration_error_and_no_traceback(content: bytes, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_bytes(content)
    argv = [sys.executable, "-m", "gateway", str(spec)]
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, check=False, text=True)
    assert result.returncode == WorkerExit.BAD_CONFIG
    assert result.stderr.startswith(f"gateway: {spec}: ")
    assert "Traceback" not in result.stderr


def test_it_imports_no_model_code() -> None:
    foreign = ["mlx", "mlx_lm", "transformers", "numpy", "supervisor", "worker"]
    code = f"import gateway.service, sys; print([m for m in {foreign} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, text=True)
    assert result.stdout.strip() == "[]"


async def test_it_starts_in_half_a_second() -> None:
    """Of processor time, the least of several starts: the rest is what other processes on this machine cost."""

    async def start() -> float:
        async with stack() as lmx:
            used = psutil.Process(lmx.gateway.process.pid).cpu_times()
            return float(used.user + used.system)

    assert await least(start, 0.75) < 0.75
