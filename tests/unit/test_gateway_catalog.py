"""Why a model does not serve, in the words and the status a client needs."""

import asyncio
import time
from typing import Any

import pytest

from gateway.bell import Bell
from gateway.catalog import CatalogView, not_ready
from gateway.control import Lease
from gateway.ids import client_id, request_id
from gateway.middleware import canonical_path
from gateway.requests import Request, RequestState, Rids
from gateway.traffic import Traffic
from protocol.control import Catalog, CatalogModel
from protocol.data import ChatMessage, Delta, Finish, Kind, Sampling, Submit, Usage
from protocol.errors import LmxError
from protocol.keys import new_key
from protocol.states import ModelState


def model(state: ModelState = ModelState.READY, error_code: str = "", retry_after_s: int | None = None) -> CatalogModel:
    return CatalogModel("org/tiny", state, 1, error_code=error_code, reason="", retry_after_s=retry_after_s)


@pytest.mark.parametrize(
    ("state", "code", "status"),
    [
        (ModelState.STOPPED, "model_not_found", 404),
        (ModelState.STARTING, "model_loading", 503),
        (ModelState.LOADING, "model_loading", 503),
        (ModelState.WARMING, "model_loading", 503),
        (ModelState.DRAINING, "model_restarting", 503),
        (ModelState.STOPPING, "model_restarting", 503),
        (ModelState.BACKOFF, "model_restarting", 503),
        (ModelState.QUARANTINED, "model_quarantined", 503),
    ],
)
async def test_each_state_has_its_error(state: ModelState, code: str, status: int) -> None:
    view = CatalogView()
    view.replace(Catalog(1, [model(state)]))
    with pytest.raises(LmxError) as caught:
        view.serving("org/tiny")
    assert (caught.value.code, caught.value.spec.status, caught.value.param) == (code, status, "model")
    assert "org/tiny" in caught.value.message
    if state is ModelState.STOPPED:
        assert "lmx-supervisor load org/tiny" in caught.value.message


def test_the_supervisors_reason_wins() -> None:
    error = not_ready(model(ModelState.BACKOFF, "insufficient_memory", 500))
    assert (error.code, error.retry_after_s) == ("insufficient_memory", 120)
    assert not_ready(model(ModelState.BACKOFF, "a_code_of_tomorrow")).code == "internal_error"


async def test_unknown_models_are_told_apart_from_unknown_catalogs() -> None:
    view = CatalogView()
    with pytest.raises(LmxError, match="does not know its models yet"):
        view.find("x")
    view.replace(Catalog(1, [model()]))
    assert await view.arrived()
    assert view.serving("org/tiny").id == "org/tiny"
    assert view.ready_count() == 1
    with pytest.raises(LmxError) as caught:
        view.find("../../etc/passwd\n" + "x" * 10_000)
    assert caught.value.code == "model_not_found"
    assert len(caught.value.message) < 300
    assert "\n" not in caught.value.message


def test_the_lease_runs_only_while_the_machine_does() -> None:
    lease = Lease(120, slept_s=3, now=0)
    assert not any(lease.expired(now, 1) for now in range(1, 121))
    assert lease.expired(121, 1)
    lease.renew(121)
    assert not lease.expired(122, 1)
    # Two hours of sleep: the supervisor slept too and gets its time again.
    assert not lease.expired(7322, 1)
    assert not any(lease.expired(7322 + n, 1) for n in range(1, 120))
    assert lease.expired(7322 + 121, 1)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/models", "/models"),
        ("//v1//models//", "/models"),
        ("/models/", "/models"),
        ("/v1/models/org/tiny", "/models/org/tiny"),
        ("/v1", "/"),
        ("/", "/"),
        ("/v10/models", "/v10/models"),
    ],
)
def test_one_path_for_its_variants(path: str, expected: str) -> None:
    assert canonical_path(path) == expected


def offered(name: bytes, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"headers": [(b"x-request-id", name), (b"x-client-id", name), *headers]}


def test_request_ids_are_kept_if_safe() -> None:
    for good in (b"abc-1.2_X", b"018f2c3e-5b7a-7cc1-9d8e-0123456789ab", b"0af7651916cd43dd8448eb211c80319c"):
        assert request_id(offered(good)) == client_id(offered(good)) == good.decode()
    for bad in (b"", b"a b", b"x" * 129, b"a\n", "é".encode()):
        assert len(request_id(offered(bad))) == len("req_") + 22
        assert client_id(offered(bad)) == ""
    assert request_id(offered(b"")) != request_id(offered(b""))


def test_what_looks_like_a_secret_is_nobodys_name() -> None:
    key = new_key().encode()
    secret = [
        key, b"run-" + key, b"sk-proj-abcdefgh", b"hf_abcdefgh", b"ghp_abcdefgh", b"AKIAIOSFODNN7EXAMPLE",
        b"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl",
    ]  # fmt: skip
    for name in secret:
        assert request_id(offered(name)).startswith("req_"), name
        assert client_id(offered(name)) == "", name
    held = offered(b"correct-horse-battery", (b"authorization", b"Bearer correct-horse-battery"))
    assert request_id(held).startswith("req_")
    assert client_id(held) == ""


def test_rids_fit_and_differ_over_restarts() -> None:
    first, second = Rids(), Rids()
    made = [first.new() for _ in range(1000)] + [second.new() for _ in range(1000)]
    assert len(set(made)) == 2000
    assert all(0 < rid < 2**63 for rid in made)


def in_a_worker(limit: int, *, streams: bool) -> tuple[Request, Bell[Request]]:
    """A request that a worker has been asked for, and what it rings."""
    submit = Submit(1, 1, Kind.CHAT, [ChatMessage("user", "hi")], Sampling(), 10.0)
    bell = Bell[Request](blocked=not streams)
    deadline_at = time.monotonic() + 10
    request = Request("m", submit, bell, limit=limit, streams=streams, continues=False, deadline_at=deadline_at)
    request.submitted()
    return request, bell


async def test_a_request_merges_what_its_reader_has_not_taken() -> None:
    request, bell = in_a_worker(100, streams=True)
    assert request.accept(5, 0)
    for text in "abc":
        assert request.add(Delta(1, text, [1]))
    assert await bell.news() == [request]
    assert request.take() == "abc"
    assert request.take() == ""
    assert request.state is RequestState.STREAMING
    request.add(Delta(1, "d", [1], Finish.STOP, Usage(5, 4)))
    assert await bell.news() == [request]
    assert (request.take(), request.finish, request.ended) == ("d", Finish.STOP, True)


async def test_states_only_move_forward() -> None:
    request, _bell = in_a_worker(100, streams=True)
    assert not request.add(Delta(1, "x", [1]))
    assert request.accept(5, 0)
    assert not request.accept(5, 0)
    request.fail(LmxError("timeout", "late"))
    request.fail(LmxError("worker_crashed", "gone"))
    assert request.error is not None
    assert request.error.code == "timeout"
    assert not request.add(Delta(1, "x", [1]))


async def test_only_a_blocked_reader_overflows() -> None:
    request, bell = in_a_worker(10, streams=True)
    cut: list[bool] = []
    bell.on_overflow = lambda: cut.append(True)
    request.accept(5, 0)
    request.add(Delta(1, "é" * 6, [1]))
    assert not request.ended
    bell.blocked = True
    request.add(Delta(1, "x", [1]))
    assert request.state is RequestState.FAILED
    assert cut == [True]
    assert bell.client_gone
    assert request.take() == ""


async def test_an_endless_whole_answer_is_the_workers_fault() -> None:
    request, _bell = in_a_worker(10, streams=False)
    request.accept(5, 0)
    request.add(Delta(1, "x" * 11, [1]))
    assert request.error is not None
    assert request.error.code == "protocol_error"


async def test_traffic_counts_and_drains() -> None:
    traffic = Traffic()
    with traffic.admit():
        assert not await traffic.idle(0.01)
        traffic.drain()
        with pytest.raises(LmxError, match="stopping"), traffic.admit():
            pass
        idle = asyncio.create_task(traffic.idle(10))
    assert await idle
