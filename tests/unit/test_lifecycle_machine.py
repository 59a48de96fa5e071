"""The policy as a state machine: Hypothesis looks for a sequence of events that breaks it, and shortens it (design 6).

The promises are those of the simulation (`tests/policykit.py`), and each run ends with the machine at rest.
"""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from protocol.states import ModelState, Phase
from supervisor import events as ev
from tests.policykit import CONFIGS, ENDS, World

MODELS = 2
slot = st.integers(0, MODELS)
luck = st.sampled_from([-1.0, 0.0, 1.0])
words = st.sampled_from([ev.Helloed(), ev.Moved(1, 2), ev.BecameReady(1.0), ev.Beat(Phase.DECODE, 9), ev.HasDrained()])


class Host(RuleBasedStateMachine):
    """Two models and a gateway."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(MODELS)

    @initialize(kind=st.integers(0, len(CONFIGS) - 1), wanted=st.sets(slot))
    def begins(self, kind: int, wanted: set[int]) -> None:
        self.world = World(MODELS, kind)
        for i in sorted(wanted):
            self.world.want(i)
        self.world.pump()

    @rule(i=slot)
    def is_wanted(self, i: int) -> None:
        self.world.want(i)
        self.world.pump()

    @rule(i=slot, force=st.booleans())
    def is_unwanted(self, i: int, force: bool) -> None:
        self.world.unwant(i, force=force)
        self.world.pump()

    @rule(i=slot, force=st.booleans())
    def is_restarted(self, i: int, force: bool) -> None:
        self.world.restart(i, force=force)
        self.world.pump()

    @rule(i=slot)
    def is_reset(self, i: int) -> None:
        self.world.reset(i)
        self.world.pump()

    @rule(i=slot)
    def is_set_aside(self, i: int) -> None:
        self.world.set_aside(i)
        self.world.pump()

    @rule(i=slot, steps=st.integers(1, 4))
    def makes_progress(self, i: int, steps: int) -> None:
        for _ in range(steps):
            self.world.progress(i)
            self.world.pump()

    @rule(i=slot)
    def is_idle(self, i: int) -> None:
        self.world.idle(i)

    @rule(i=slot, stuck=st.booleans())
    def falls_silent(self, i: int, stuck: bool) -> None:
        self.world.fall_silent(i, stuck=stuck)

    @rule(i=slot)
    def wakes_up(self, i: int) -> None:
        self.world.wake_up(i)

    @rule(i=slot)
    def has_drained(self, i: int) -> None:
        self.world.drained(i)
        self.world.pump()

    @rule(i=slot, end=st.sampled_from(ENDS), luck=luck)
    def ends(self, i: int, end: ev.ExitRecord, luck: float) -> None:
        self.world.end(i, end, luck)
        self.world.pump()

    @rule(i=slot, end=st.sampled_from(ENDS[:6]), ready_s=st.sampled_from([-1.0, 0.0, 70.0, 400.0, 700.0]), luck=luck)
    def comes_up_and_crashes(self, i: int, end: ev.ExitRecord, ready_s: float, luck: float) -> None:
        self.world.pass_time(90.0)
        self.world.pump()
        for _ in range(0 if ready_s < 0 else 3):
            self.world.progress(i)
            self.world.pump()
        if ready_s > 0:
            self.world.pass_time(ready_s)
        self.world.end(i, end, luck)
        self.world.pump()

    @rule(i=slot, event=words)
    def is_heard_late(self, i: int, event: ev.Event) -> None:
        self.world.stray(i, event)

    @rule(i=slot, footprint=st.integers(0, 3))
    def is_weighed(self, i: int, footprint: int) -> None:
        self.world.weigh(i, footprint)

    @rule(i=slot, gib=st.sampled_from([0, 40, 500]))
    def grows(self, i: int, gib: int) -> None:
        self.world.grow(i, gib)

    @rule(refuses=st.booleans())
    def the_system_refuses_to_start_processes(self, refuses: bool) -> None:
        self.world.refuses = refuses

    @rule(seconds=st.sampled_from([0.5, 5.0, 30.0, 70.0, 400.0, 4000.0]), late=st.sampled_from([0.0, 1.5]))
    def time_passes(self, seconds: float, late: float) -> None:
        self.world.pass_time(seconds, late)
        self.world.pump()

    @rule(seconds=st.sampled_from([0.1, 7200.0]))
    def the_machine_sleeps(self, seconds: float) -> None:
        self.world.sleep(seconds)
        self.world.pump()

    @precondition(lambda self: any(process is not None for process in self.world.processes))
    @rule()
    def the_supervisor_dies(self) -> None:
        self.world.supervisor_dies()

    @precondition(lambda self: any(slot.state is ModelState.QUARANTINED for slot in self.world.slots))
    @rule()
    def an_hour_passes(self) -> None:
        for _ in range(20):
            self.world.pass_time(3600.0)
            self.world.pump()

    def teardown(self) -> None:
        self.world.settle()


def test_no_sequence_of_events_breaks_a_promise_of_the_policy() -> None:
    run_state_machine_as_test(
        Host,
        settings=settings(
            max_examples=80,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
