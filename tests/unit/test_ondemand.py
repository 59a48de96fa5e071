"""Models that the first request for them loads."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from protocol.control import CatalogModel
from protocol.states import ModelState
from supervisor.admission import NoRoomError
from supervisor.journal import Journal
from supervisor.ondemand import ALL, OnDemand
from supervisor.views import loadable_model

FOLDERS = {"lazy": Path("/models/lazy"), "other": Path("/models/other")}


class World:
    """Loads that wait for `go`, and what was said about them."""

    def __init__(self, folder: Path, *allowed: str) -> None:
        self.go = asyncio.Event()
        self.error: Exception | None = None
        self.loads: list[str] = []
        self.changes = 0
        self.closed = ""
        self.ended = asyncio.Event()
        self.on_demand = OnDemand(
            allowed,
            Journal(folder / "events.jsonl"),
            folders=lambda: FOLDERS,
            load=self.load,
            closed=lambda: self.closed,
            changed=self.changed,
        )

    async def load(self, model: str, path: Path) -> None:
        self.loads.append(model)
        assert path == FOLDERS[model]
        await self.go.wait()
        if self.error is not None:
            raise self.error

    def changed(self) -> None:
        self.changes += 1
        self.ended.set()

    async def finish(self) -> None:
        self.go.set()
        async with asyncio.timeout(10):
            await self.ended.wait()


async def test_a_model_is_loaded_once_however_many_ask(tmp_path: Path) -> None:
    world = World(tmp_path, "lazy")
    for _ in range(50):
        world.on_demand.wanted("lazy")
        await asyncio.sleep(0)
    await world.finish()
    assert world.loads == ["lazy"]


@pytest.mark.parametrize(("allowed", "model"), [(["lazy"], "other"), ([], "lazy"), ([ALL], "nowhere"), (["x"], "x")])
async def test_what_may_not_be_loaded_or_is_not_there_is_not_loaded(
    tmp_path: Path, allowed: list[str], model: str
) -> None:
    world = World(tmp_path, *allowed)
    world.on_demand.wanted(model)
    await asyncio.sleep(0)
    assert world.loads == []


async def test_a_star_stands_for_every_model_of_the_folder(tmp_path: Path) -> None:
    world = World(tmp_path, ALL)
    for model in FOLDERS:
        world.on_demand.wanted(model)
    await asyncio.sleep(0)
    assert world.loads == list(FOLDERS)
    world.on_demand.close()


async def test_a_refusal_is_told_to_clients_and_not_tried_again_for_a_while(tmp_path: Path) -> None:
    world = World(tmp_path, "lazy")
    world.error = NoRoomError("needs 9 GiB, there are 2")
    world.on_demand.wanted("lazy")
    await world.finish()
    world.on_demand.wanted("lazy")
    await asyncio.sleep(0)
    assert world.loads == ["lazy"]
    now = asyncio.get_running_loop().time()
    assert world.on_demand.refusal("lazy", now) == ("insufficient_memory", "needs 9 GiB, there are 2")
    assert world.on_demand.refusal("lazy", now + 60) is None


async def test_nothing_is_loaded_on_demand_in_safe_mode(tmp_path: Path) -> None:
    world = World(tmp_path, "lazy")
    world.closed = "two panics in a day"
    world.on_demand.wanted("lazy")
    await asyncio.sleep(0)
    assert (world.loads, world.changes) == ([], 1)
    refusal = world.on_demand.refusal("lazy", asyncio.get_running_loop().time())
    assert refusal == ("model_quarantined", "nothing is loaded on demand: two panics in a day")


def shown(**how: Any) -> CatalogModel:
    return loadable_model("lazy", Path("/nowhere"), **how)


def test_the_catalog_says_what_a_request_will_meet() -> None:
    assert {model.state for model in (shown(), shown(on_demand=True))} == {ModelState.STOPPED}
    assert (shown().error_code, shown().on_demand) == ("model_not_found", False)
    assert (shown(on_demand=True).error_code, shown(on_demand=True).on_demand) == ("model_loading", True)
    refused = shown(on_demand=True, refusal=("insufficient_memory", "no room"))
    assert (refused.error_code, refused.reason, refused.on_demand) == ("insufficient_memory", "no room", False)
