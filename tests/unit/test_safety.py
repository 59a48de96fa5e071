"""Safe mode and panic strikes: what the supervisor does after bad runs, from what was written down."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.config import Config, LifecycleConfig
from protocol.paths import Home
from supervisor.intent import Intent
from supervisor.journal import Journal
from supervisor.platform import current_platform
from supervisor.safety import Strike, crash_loop_of_supervisor, panic_loop
from supervisor.store import Desired, DesiredModel, Runtime, Store

HOUR = 3600.0
NOW = 1_800_000_000.0
CONFIG = LifecycleConfig()


def test_three_starts_within_a_minute_are_a_crash_loop() -> None:
    assert crash_loop_of_supervisor((NOW - 50, NOW - 20, NOW), NOW, CONFIG)
    assert not crash_loop_of_supervisor((NOW - 61, NOW - 20, NOW), NOW, CONFIG)
    assert not crash_loop_of_supervisor((NOW - 3 * 86400, NOW - 86400, NOW), NOW, CONFIG)


def test_two_panics_in_a_day_or_three_in_three_days_keep_everything_unloaded() -> None:
    def strikes(*hours: float) -> tuple[Strike, ...]:
        return tuple(Strike("m", NOW - h * HOUR, "") for h in hours)

    assert panic_loop(strikes(20, 1), NOW)
    assert not panic_loop(strikes(30, 1), NOW)
    assert panic_loop(strikes(70, 40, 1), NOW)
    assert not panic_loop(strikes(80, 40, 1), NOW)


@pytest.fixture
def home() -> Iterator[Home]:
    with tempfile.TemporaryDirectory(prefix="lmx-", dir="/tmp") as folder:  # short: sockets would lie in it
        home = Home(Path(folder) / "h")
        home.ensure()
        yield home


def begin(home: Home, before: Runtime, *, panic: str = "", boot_id: str = "now", now: float = NOW) -> Intent:
    store = Store(home, current_platform())
    desired, _ = store.load()
    intent = Intent(home, Config(), store, Journal(home.state / "events.jsonl"))
    models = tuple(DesiredModel(name, f"/models/{name}", 1.0) for name in ("bad", "good"))
    intent.begin(desired or Desired(models), before, boot_id=boot_id, now=now, panic=lambda _since: panic)
    return intent


def test_a_panic_during_a_load_strikes_the_model_and_it_is_not_loaded_by_itself(home: Home) -> None:
    crashed = Runtime(boot_id="then", load_mark="bad", started_at=NOW - 100)
    intent = begin(home, crashed, panic="watchdog timeout")
    assert "watchdog timeout" in intent.why_not("bad")
    assert intent.why_not("good") == ""
    assert intent.safe_mode == ""
    assert [model.id for model in intent.to_load()] == ["good", "bad"], "the safest first"
    # It is still so after the next, clean start; a second panic within the day is safe mode, until resume.
    assert begin(home, Runtime(boot_id="now", last_clean_shutdown=True)).why_not("bad")
    second = begin(home, crashed, panic="again", now=NOW + HOUR)
    assert "panics" in second.safe_mode
    third = begin(home, Runtime(boot_id="now", last_clean_shutdown=True), now=NOW + 2 * HOUR)
    assert third.safe_mode
    assert third.resume(NOW + 2 * HOUR)
    assert begin(home, Runtime(boot_id="now", last_clean_shutdown=True), now=NOW + 3 * HOUR).safe_mode == ""


def test_a_power_loss_or_a_clean_reboot_strikes_nobody(home: Home) -> None:
    assert begin(home, Runtime(boot_id="then", load_mark="bad")).why_not("bad") == ""
    clean = Runtime(boot_id="then", load_mark="bad", last_clean_shutdown=True)
    assert begin(home, clean, panic="old report").why_not("bad") == ""
    same_boot = Runtime(boot_id="now", load_mark="bad")
    assert begin(home, same_boot, panic="old report").why_not("bad") == ""


def test_a_pardon_is_remembered(home: Home) -> None:
    begin(home, Runtime(boot_id="then", load_mark="bad"), panic="x").pardon("bad")
    assert begin(home, Runtime(boot_id="now", last_clean_shutdown=True)).why_not("bad") == ""


def test_clean_stops_never_add_up_to_safe_mode(home: Home) -> None:
    starts: tuple[float, ...] = ()
    for k in range(6):
        intent = begin(home, Runtime(boot_id="now", last_clean_shutdown=True, starts=starts), now=NOW + k)
        starts = intent.starts
        assert intent.safe_mode == ""
    for k in range(3):
        intent = begin(home, Runtime(boot_id="now", starts=starts), now=NOW + 10 + k)
        starts = intent.starts
    assert intent.safe_mode
