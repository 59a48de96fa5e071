"""The life of a process as a pure function, on a virtual clock (design 6)."""

import random
from collections.abc import Iterable

import msgspec
import pytest

from protocol.config import LifecycleConfig
from protocol.states import ModelState, Phase
from supervisor import events as ev
from supervisor.events import Action
from supervisor.exits import classify
from supervisor.lifecycle import advance, may_start, next_deadline, weigh
from supervisor.restarts import gateway_policy, worker_policy
from supervisor.slot import Settings, Slot

CONFIG = LifecycleConfig()
SETTINGS = Settings(CONFIG, worker_policy(CONFIG))
ABORTED = classify(-6, at=0.0, asked=False, hung=False)
CORRUPT = classify(65, at=0.0, asked=False, hung=False, last_words="model.safetensors is truncated")
LEASE = classify(90, at=0.0, asked=False, hung=False)


def play(steps: Iterable[tuple[float, ev.Event]], slot: Slot | None = None) -> tuple[Slot, list[Action]]:
    slot, actions = slot or Slot(), []
    for now, event in steps:
        slot, more = advance(slot, event, now, SETTINGS)
        actions += more
    return slot, actions


def ready(at: float = 10.0) -> Slot:
    steps: list[tuple[float, ev.Event]] = [
        (0.0, ev.Want()),
        (0.0, ev.Started(pid=11, incarnation=1)),
        (1.0, ev.Helloed()),
        (2.0, ev.Moved(50, 100)),
        (3.0, ev.Beat(Phase.WARMING, 0)),
        (at, ev.BecameReady(load_s=at)),
    ]
    return play(steps)[0]


def test_a_wanted_model_goes_through_every_state_to_ready() -> None:
    slot, states = Slot(), []
    for now, event in enumerate(
        [ev.Want(), ev.Started(1, 1), ev.Helloed(), ev.Beat(Phase.WARMING, 0), ev.BecameReady(2.0)]
    ):
        slot, _ = advance(slot, event, now, SETTINGS)
        states.append(slot.state.value)
    assert states == ["starting", "starting", "loading", "warming", "ready"]
    assert slot.pid == 1


def test_a_crash_after_ready_waits_its_delay_and_then_may_start() -> None:
    slot, _ = play([(30.0, ev.Exited(ABORTED))], ready())
    assert (slot.state, slot.pid, slot.last_exit) == (ModelState.BACKOFF, 0, ABORTED)
    assert slot.retry_at == pytest.approx(31.0)
    assert may_start([slot], 30.9) is None
    assert may_start([slot], 31.0) == 0


def test_a_crash_after_a_minute_of_ready_may_start_at_once() -> None:
    slot, _ = play([*((t, ev.Beat(Phase.IDLE, 0)) for t in range(11, 80)), (80.0, ev.Exited(ABORTED))], ready())
    assert may_start([slot], 80.0) == 0


def test_a_damaged_model_is_set_aside_after_one_attempt_with_the_reason() -> None:
    slot, _ = play([(0, ev.Want()), (0, ev.Started(5, 1)), (1, ev.Exited(CORRUPT))])
    assert slot.state is ModelState.QUARANTINED
    assert "model.safetensors is truncated" in slot.reason
    assert next_deadline(slot, SETTINGS) is None


def test_three_crashes_before_ready_set_the_model_aside() -> None:
    slot = Slot(wanted=True)
    now = 0.0
    slot, _ = play([(now, ev.Want())], slot)
    for k in range(3):
        now += 100
        slot, _ = play([(now, ev.Started(20 + k, k + 1)), (now + 1, ev.Exited(ABORTED))], slot)
    assert slot.state is ModelState.QUARANTINED
    assert "before it was ready" in slot.reason


def test_an_expired_lease_is_not_counted() -> None:
    slot, _ = play([(20.0, ev.Exited(LEASE))], ready())
    assert slot.state is ModelState.BACKOFF
    assert slot.history.failed_at == ()


def test_unload_drains_then_stops_then_forgets() -> None:
    slot, actions = play([(20.0, ev.Unwant()), (21.0, ev.HasDrained())], ready())
    assert (slot.state, actions) == (ModelState.STOPPING, [Action.ASK_DRAIN, Action.ASK_STOP])
    slot, _ = play([(22.0, ev.Exited(classify(0, at=0, asked=True, hung=False)))], slot)
    assert (slot.state, slot.pid) == (ModelState.STOPPED, 0)


def test_a_drain_that_takes_too_long_is_cut() -> None:
    slot, _ = play([(20.0, ev.Unwant())], ready())
    beats = [(20.0 + t, ev.Beat(Phase.DECODE, t)) for t in range(1, 30)]
    slot, actions = play([*beats, (50.1, ev.Tick())], slot)
    assert (slot.state, actions) == (ModelState.STOPPING, [Action.ASK_STOP])


def test_a_stop_that_is_ignored_ends_in_sigkill_after_the_grace() -> None:
    slot, _ = play([(20.0, ev.Unwant(force=True))], ready())
    assert play([(34.9, ev.Tick())], slot)[1] == []
    slot, actions = play([(35.1, ev.Tick())], slot)
    assert actions == [Action.KILL]


def test_a_huge_model_gets_more_time_to_stop() -> None:
    slot, _ = play([(20.0, ev.Unwant(force=True))], weigh(ready(), 100 * 1024**3))
    assert play([(45.0, ev.Tick())], slot)[1] == []
    assert play([(50.1, ev.Tick())], slot)[1] == [Action.KILL]


def test_a_process_whose_memory_still_falls_is_not_killed_until_300_s() -> None:
    slot, _ = play([(19.0, ev.Weighed(10**15)), (20.0, ev.Unwant(force=True))], ready())
    weight, now = 10**15, 20.0
    while now < 315.0:
        now += 4.0
        weight = weight * 9 // 10
        slot, actions = play([(now, ev.Weighed(weight)), (now, ev.Tick())], slot)
        assert actions == []
    assert play([(320.1, ev.Tick())], slot)[1] == [Action.KILL]
    still, _ = play([(100.0, ev.Weighed(500))], play([(20.0, ev.Unwant(force=True))], ready())[0])
    assert play([(35.1, ev.Tick())], still)[1] == [Action.KILL]


def test_a_small_process_whose_share_of_the_libraries_shrinks_gets_no_more_time_for_it() -> None:
    slot, _ = play([(19.0, ev.Weighed(50_000_000)), (20.0, ev.Unwant(force=True))], ready())
    slot, _ = play([(34.0, ev.Weighed(45_000_000)), (35.1, ev.Tick())], slot)
    assert slot.killed


def test_a_process_that_survives_sigkill_is_killed_again_once_an_hour_and_not_without_pause() -> None:
    slot, _ = play([(20.0, ev.Unwant(force=True)), (35.1, ev.Tick())], ready())
    for _ in range(3):
        due = next_deadline(slot, SETTINGS)
        assert due is not None
        assert due == pytest.approx(slot.since + 3600)
        slot, actions = play([(due, ev.Tick())], slot)
        assert actions == [Action.KILL]
        assert play([(due + 1, ev.Tick())], slot)[1] == []


def test_restart_replaces_the_process_and_forgets_its_failures() -> None:
    slot, actions = play([(20.0, ev.Restart()), (21.0, ev.HasDrained())], ready())
    assert Action.ASK_STOP in actions
    slot, _ = play([(22.0, ev.Exited(classify(0, at=0, asked=True, hung=False)))], slot)
    assert (slot.state, slot.waiting) == (ModelState.STARTING, True)
    assert may_start([slot], 22.0) == 0


def test_restart_brings_a_quarantined_model_back() -> None:
    slot, _ = play([(0, ev.Want()), (0, ev.Started(5, 1)), (1, ev.Exited(CORRUPT)), (2, ev.Restart())])
    assert may_start([slot], 2) == 0


def hang(slot: Slot, steps: list[tuple[float, ev.Event]]) -> list[Action]:
    return play(steps, slot)[1]


def test_a_silent_worker_is_late_at_5_s_and_ended_at_15_s() -> None:
    slot, actions = play([(15.1, ev.Tick())], ready(at=10.0))
    assert slot.late
    assert actions == []
    slot, actions = play([(25.1, ev.Tick())], slot)
    assert actions == [Action.DUMP_STACKS]
    slot, actions = play([(26.2, ev.Tick()), (28.3, ev.Tick())], slot)
    assert actions == [Action.TERMINATE, Action.KILL]
    slot, _ = play([(28.4, ev.Exited(classify(-9, at=0, asked=False, hung=True)))], slot)
    assert slot.state is ModelState.BACKOFF
    assert slot.last_exit is not None
    assert slot.last_exit.name == "hang"


def test_a_heartbeat_before_the_deadline_is_not_a_crash() -> None:
    slot, actions = play([(15.1, ev.Tick()), (24.0, ev.Beat(Phase.IDLE, 0)), (25.1, ev.Tick())], ready(at=10.0))
    assert (slot.state, slot.late, actions) == (ModelState.READY, False, [])


def test_a_frozen_engine_is_found_although_its_heartbeats_arrive() -> None:
    beats: list[tuple[float, ev.Event]] = [(10.0 + t, ev.Beat(Phase.DECODE, 7)) for t in range(1, 31)]
    slot, actions = play([*beats, (40.5, ev.Tick())], ready(at=10.0))
    assert actions == []
    slot, actions = play([(41.0, ev.Beat(Phase.DECODE, 7)), (41.1, ev.Tick())], slot)
    assert actions == [Action.DUMP_STACKS]
    assert "decode" in slot.condemned


def test_an_idle_engine_is_not_frozen() -> None:
    beats: list[tuple[float, ev.Event]] = [(10.0 + t, ev.Beat(Phase.IDLE, 7)) for t in range(1, 500)]
    assert play([*beats, (509.5, ev.Tick())], ready(at=10.0))[1] == []


def test_a_load_without_bytes_moving_is_ended_and_one_that_moves_is_not() -> None:
    start: list[tuple[float, ev.Event]] = [(0, ev.Want()), (0, ev.Started(5, 1)), (1, ev.Helloed())]
    beats: list[tuple[float, ev.Event]] = [(float(t), ev.Beat(Phase.LOADING, 0)) for t in range(1, 60)]
    stalled = sorted([*start, *beats, (31.5, ev.Tick())], key=lambda step: step[0])
    assert play(stalled)[1][:1] == [Action.DUMP_STACKS]
    moving = sorted(
        [*start, *beats, *((float(t), ev.Moved(t, 100)) for t in range(2, 60, 5)), (31.5, ev.Tick())],
        key=lambda step: step[0],
    )
    assert play(moving)[1] == []


def test_a_process_that_never_says_hello_is_ended() -> None:
    assert play([(0, ev.Want()), (0, ev.Started(5, 1)), (20.1, ev.Tick())])[1] == [Action.DUMP_STACKS]


def test_a_machine_that_slept_starts_every_deadline_again() -> None:
    slot, actions = play([(7200.0, ev.Tick(late_s=7100.0)), (7204.0, ev.Tick())], ready())
    assert (slot.state, slot.late, actions) == (ModelState.READY, False, [])


def test_one_model_loads_at_a_time_and_the_one_that_waits_longest_is_next() -> None:
    loading, _ = play([(0, ev.Want()), (0, ev.Started(5, 1))])
    first, _ = play([(1.0, ev.Want())])
    second, _ = play([(2.0, ev.Want())])
    assert may_start([loading, second, first], 9.0) is None
    assert may_start([ready(), second, first], 9.0) == 2


def test_words_of_a_dead_process_change_nothing() -> None:
    dead, _ = play([(20.0, ev.Exited(ABORTED))], ready())
    for event in (ev.Helloed(), ev.Moved(1, 2), ev.BecameReady(1.0), ev.Beat(Phase.DECODE, 9), ev.HasDrained()):
        assert advance(dead, event, 20.5, SETTINGS) == (dead, ())


@pytest.mark.parametrize("policy", ["worker", "gateway"])
def test_no_schedule_of_events_breaks_an_invariant(policy: str) -> None:
    """Any event at any moment, sensible or not; `test_policy_simulation.py` plays what can really happen."""
    make = worker_policy if policy == "worker" else gateway_policy
    settings = Settings(CONFIG, make(CONFIG))
    rng = random.Random(policy)
    for _ in range(500):
        slot, now, pid = Slot(), 0.0, 0
        for _ in range(rng.randint(1, 40)):
            now += rng.choice([0.0, 0.1, 1.0, 10.0, 40.0, 300.0])
            event = _random_event(rng, slot, now)
            if isinstance(event, ev.Started):
                pid += 1
                event = ev.Started(pid, pid)
            before, (slot, actions) = slot, advance(slot, event, now, settings)
            assert (slot.pid != 0) == slot.alive, (before, event, slot)
            if isinstance(event, ev.Exited):
                assert slot.pid == 0
            elif not isinstance(event, ev.Started):
                assert slot.pid == before.pid, "only an exit ends a process"
            if actions:
                assert slot.alive
            if slot.alive or slot.waiting:
                assert next_deadline(slot, settings) is not None
            if policy == "gateway":
                assert slot.state is not ModelState.QUARANTINED
            if slot.wanted:
                assert slot.state is not ModelState.STOPPED


def _random_event(rng: random.Random, slot: Slot, now: float) -> ev.Event:
    always: list[ev.Event] = [
        ev.Want(),
        ev.Unwant(force=rng.random() < 0.5),
        ev.Restart(force=rng.random() < 0.5),
        ev.Tick(late_s=rng.choice([0.0, 0.0, 0.0, 60.0])),
        ev.Helloed(),
        ev.Moved(rng.randint(0, 5), 5),
        ev.BecameReady(1.0),
        ev.Beat(rng.choice(list(Phase)), rng.randint(0, 3)),
        ev.HasDrained(),
        ev.Weighed(rng.randint(0, 9)),
        ev.Reset(),
        ev.SetAside("x"),
    ]
    if may_start([slot], now) is not None:
        always += [ev.Started(1, 1)] * 4
    if slot.alive:
        records = [classify(code, at=now, asked=False, hung=False) for code in (-6, -9, 65, 70, 87, 90, 0, None)]
        always += [ev.Exited(rng.choice(records), rng.uniform(-1, 1))] * 3
    return rng.choice(always)


def test_slots_are_values() -> None:
    slot = ready()
    assert msgspec.structs.replace(slot) == slot


def fail_until_quarantined(now: float = 0.0) -> Slot:
    slot, _ = play([(now, ev.Want())])
    for k in range(3):
        now += 100
        slot, _ = play([(now, ev.Started(20 + k, k + 1)), (now + 1, ev.Exited(ABORTED))], slot)
    return slot


def test_a_model_in_quarantine_is_tried_again_after_10_30_and_60_minutes() -> None:
    slot, waits = fail_until_quarantined(), []
    for k in range(4):
        waits.append(slot.probe_at - slot.since)
        assert advance(slot, ev.Tick(), slot.probe_at - 0.1, SETTINGS) == (slot, ())
        now = slot.probe_at
        slot, _ = play([(now, ev.Tick())], slot)
        assert may_start([slot], now) == 0
        assert slot.next_degraded(CONFIG)
        slot, _ = play([(now, ev.Started(50 + k, 10 + k, True)), (now + 5, ev.Exited(ABORTED))], slot)
        assert slot.state is ModelState.QUARANTINED, "one failure puts a probe back"
    assert waits == [600, 1800, 3600, 3600]


def test_a_probe_that_stays_ready_for_a_minute_ends_the_quarantine() -> None:
    slot = fail_until_quarantined()
    now = slot.probe_at
    beats = [(now + 6.0 + t, ev.Beat(Phase.IDLE, 0)) for t in range(70)]
    slot, _ = play([(now, ev.Tick()), (now, ev.Started(9, 9, True)), (now + 5, ev.BecameReady(4.0))], slot)
    slot, _ = play([*beats, (now + 66, ev.Tick())], slot)
    assert (slot.probing, slot.history.failed_at) == (False, ())
    slot, _ = play([(now + 90, ev.Exited(ABORTED))], slot)
    assert slot.state is ModelState.BACKOFF


def test_a_damaged_model_is_not_tried_again_by_itself() -> None:
    slot, _ = play([(0, ev.Want()), (0, ev.Started(5, 1)), (1, ev.Exited(CORRUPT))])
    assert slot.probe_at == 0
    assert play([(1e6, ev.Tick())], slot)[0] == slot


def test_from_the_third_try_a_model_runs_degraded() -> None:
    slot, _ = play([(0, ev.Want())])
    degraded = []
    for k in range(3):
        degraded.append(slot.next_degraded(CONFIG))
        slot, _ = play([(k * 100, ev.Started(k + 1, k + 1)), (k * 100 + 50, ev.BecameReady(1.0))], slot)
        slot, _ = play([(k * 100 + 80, ev.Exited(ABORTED))], slot)
    assert degraded == [False, False, True]


def test_a_crash_that_asks_for_it_degrades_the_next_try_at_once() -> None:
    asks = msgspec.structs.replace(ABORTED, degrade=True, extra_delay_s=60.0)
    slot, _ = play([(30.0, ev.Exited(asks))], ready())
    assert slot.next_degraded(CONFIG)
    assert slot.retry_at == pytest.approx(90.0)


def test_reset_forgets_failures_and_starts_what_was_set_aside() -> None:
    slot, _ = play([(400, ev.Reset())], fail_until_quarantined())
    assert (slot.state, slot.history.failed_at, may_start([slot], 400)) == (ModelState.STARTING, (), 0)
    healthy = ready()
    assert play([(20, ev.Reset())], healthy)[0].pid == healthy.pid


def test_what_is_set_aside_for_a_panic_stays_until_it_is_asked_for() -> None:
    slot, _ = play([(0, ev.SetAside("the machine panicked"))])
    assert (slot.state, slot.reason, slot.probe_at) == (ModelState.QUARANTINED, "the machine panicked", 0)
    assert play([(1e6, ev.Tick())], slot)[0].state is ModelState.QUARANTINED
    assert may_start([play([(1e6, ev.Want())], slot)[0]], 1e6) == 0


def test_what_others_saw_of_a_process_ends_it_at_once_and_counts() -> None:
    slot, actions = play([(20.0, ev.Condemned("sent nonsense"))], ready())
    assert (slot.state, slot.condemned, actions) == (ModelState.STOPPING, "sent nonsense", [Action.KILL])
    slot, actions = play([(20.1, ev.Condemned("again"))], slot)
    assert (slot.condemned, actions) == ("sent nonsense", [])
    ended = classify(-9, at=0.0, asked=False, hung=True, last_words=slot.condemned, verdict="protocol_error")
    assert (ended.name, ended.counted) == ("protocol_error", True)
    slot, _ = play([(20.2, ev.Exited(ended))], slot)
    assert (slot.state, slot.pid) == (ModelState.BACKOFF, 0)


def test_a_process_that_is_gone_or_going_anyway_is_not_condemned() -> None:
    asked, _ = play([(20.0, ev.Unwant(force=True))], ready())
    for slot in (Slot(), asked):
        after, actions = advance(slot, ev.Condemned("late news"), 21.0, SETTINGS)
        assert (after, actions) == (slot, ())
