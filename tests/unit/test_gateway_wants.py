"""The gateway tells the supervisor which models are wanted that are loaded on demand."""

from typing import Any

import pytest

from gateway.catalog import CatalogView
from gateway.numbers import Numbers
from gateway.pool import WorkerPool
from protocol.config import GatewayConfig
from protocol.control import CatalogModel, Wanted
from protocol.states import ModelState


def model(name: str, *, on_demand: bool = True) -> CatalogModel:
    return CatalogModel(name, ModelState.STOPPED, 0, on_demand=on_demand)


async def test_a_model_is_asked_for_once_a_second_however_many_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("gateway.pool.time.monotonic", lambda: now)
    said: list[Any] = []
    pool = WorkerPool(GatewayConfig(), CatalogView(), said.append, Numbers())
    for _ in range(50):
        pool.want(model("lazy"))
    pool.want(model("other"))
    pool.want(model("loaded-by-hand", on_demand=False))
    assert said == [Wanted("lazy"), Wanted("other")]
    now = 101.5
    pool.want(model("lazy"))
    pool.close()
    assert said[2:] == [Wanted("lazy")]
