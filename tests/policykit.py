"""A host with its processes on a virtual clock, around the real policy, and what must hold whatever happens.

`World` does what `supervisor.host` does with the pure functions (lifecycle, restarts, breaker), and plays the
processes. Beside that it keeps books of its own, written from design 6 and not from the code: which process really
lives, who was told what and when, which failures still count, when a start is owed and when one is forbidden. After
each step both have to agree. `tests/unit/test_policy_simulation.py` and `test_lifecycle_machine.py` choose what
happens.
"""

from typing import Final

import msgspec

from protocol.config import LifecycleConfig
from protocol.states import ModelState, Phase
from supervisor import events as ev
from supervisor.breaker import Breaker, after_failure, after_start, start_allowed_at
from supervisor.events import Action
from supervisor.exits import ExitRecord, classify, record
from supervisor.lifecycle import DUMP_TO_TERM_S, TERM_TO_KILL_S, advance, may_start, next_deadline, weigh
from supervisor.restarts import RestartPolicy, gateway_policy, worker_policy
from supervisor.slot import Settings, Slot

GIB: Final = 1024**3
GATEWAY: Final = 0
NEVER: Final = float("inf")

ASKED = classify(0, at=0.0, asked=True, hung=False)
HUNG = classify(-9, at=0.0, asked=False, hung=True)
REFUSED = record("start_failed", at=0.0)
#: Ends of their own: counted, not counted, permanent, ones that ask for less or for a pause.
ENDS = (
    *(classify(code, at=0.0, asked=False, hung=False) for code in (-6, -6, -9, 70, 87)),
    record("gpu_ignored", at=0.0),
    *(classify(code, at=0.0, asked=False, hung=False) for code in (-6, 86, 90, 65, 0, None)),
    record("gpu_victim", at=0.0),
    record("gpu_timeout", at=0.0),
)
CONFIGS = (
    LifecycleConfig(),
    LifecycleConfig(),
    LifecycleConfig(
        restart_delays_s=(0.0, 0.5), restart_jitter=0.5, burst_failures=2, probe_delays_s=(30.0,), stable_s=8
    ),
    LifecycleConfig(unready_failures=5, burst_failures=4, breaker_failures=2, breaker_window_s=90, breaker_open_s=300),
    LifecycleConfig(probe_delays_s=(), slow_failures=2, forgive_one_s=30.0, forgive_all_s=90.0, degraded_from_try=2),
)
_MODEL_SETTINGS = tuple(Settings(config, worker_policy(config)) for config in CONFIGS)
_GATEWAY_SETTINGS = tuple(Settings(config, gateway_policy(config)) for config in CONFIGS)


class Process:
    """One process as it really is, and what it was told."""

    __slots__ = (
        "asked_at",
        "drain_at",
        "dumped_at",
        "fell_at",
        "footprint",
        "killed_at",
        "moved",
        "moved_at",
        "mute",
        "phase",
        "pid",
        "ready_at",
        "sign_at",
        "since",
        "step",
        "step_at",
        "stuck",
        "term_at",
    )

    def __init__(self, pid: int, now: float) -> None:
        self.pid = pid
        #: None until it has said hello.
        self.phase: Phase | None = None
        self.since = self.sign_at = self.moved_at = self.step_at = now
        self.step = self.moved = self.footprint = 0
        self.mute = self.stuck = False
        self.asked_at = self.drain_at = self.dumped_at = self.term_at = self.killed_at = self.ready_at = -1.0
        self.fell_at = -1.0

    @property
    def coming_up(self) -> bool:
        return self.ready_at < 0 and self.asked_at < 0 and self.dumped_at < 0 and self.drain_at < 0

    @property
    def beats(self) -> bool:
        """Whether heartbeats arrive, so that only other deadlines count."""
        return not self.mute and self.phase is not None and self.asked_at < 0 and self.dumped_at < 0

    def overdue(self, config: LifecycleConfig, gib: float) -> float:
        """When the first deadline of design 6 passes for a process that nobody asked to stop."""
        if self.phase is None:
            return self.since + config.hello_s
        return min(self.sign_at + config.heartbeat_hung_s, self.limit(config, gib))

    def limit(self, config: LifecycleConfig, gib: float) -> float:
        """When it is out of time although its heartbeats arrive."""
        if self.drain_at >= 0:
            return NEVER
        if self.phase is Phase.LOADING:
            limit = config.load_base_s + config.load_per_gib_s * gib
            return min(self.since + limit, max(self.moved_at, self.since) + config.load_stall_s)
        if self.phase is Phase.WARMING:
            return self.since + config.warm_up_s
        if self.phase is Phase.PREFILL:
            return self.step_at + config.prefill_s
        if self.phase is Phase.DECODE:
            return self.step_at + config.decode_s
        return NEVER


class Account:
    """What is owed to one slot, by design 6."""

    __slots__ = (
        *("aside", "attempt", "desired", "failed", "forgiven", "last"),
        *("load_s", "not_before", "probes", "probing", "unready"),
    )

    def __init__(self, *, desired: bool) -> None:
        self.desired = desired
        self.load_s = 0.0
        self.forgiven = False
        self.last: ExitRecord | None = None
        #: In quarantine: when it is tried again, NEVER for not by itself; below 0 not in quarantine.
        self.aside = -1.0
        self.not_before = 0.0
        self.pardon()

    def pardon(self) -> None:
        self.failed: list[float] = []
        self.unready = self.attempt = self.probes = 0
        self.probing = False

    def fail(self, policy: RestartPolicy, end: ExitRecord, ready_for: float, now: float, luck: float) -> str:
        """Count a failure; return "quarantined" or "backoff", with `not_before` set for the latter."""
        if end.permanent and policy.quarantine:
            return "quarantined"
        self.not_before = now + end.extra_delay_s
        if not end.counted:
            return "backoff"
        if ready_for < 0:
            self.unready += 1
        else:
            self.unready = 0
            forgiven = int(ready_for // policy.forgive_one_s)
            self.forgiven = bool(forgiven and self.failed)
            if ready_for >= policy.forgive_all_s:
                forgiven = len(self.failed) + self.attempt
            self.failed = self.failed[forgiven:]
            self.attempt = max(0, self.attempt - forgiven)
        self.failed.append(now)
        if self.attempt == 0 and not (ready_for >= policy.stable_s and ready_for >= 0):
            self.attempt = 1
        delay = policy.delays_s[min(self.attempt, len(policy.delays_s) - 1)] * (1 + policy.jitter * luck)
        self.attempt = min(self.attempt, len(policy.delays_s) - 1) + 1
        self.not_before = now + max(end.extra_delay_s, delay)
        burst = sum(now - at <= policy.burst_s for at in self.failed)
        window = max(policy.slow_s, 6 * (self.load_s + 60))
        slow = sum(now - at <= window for at in self.failed)
        loop = self.unready >= policy.unready_failures or burst >= policy.burst_failures or slow >= policy.slow_failures
        return "quarantined" if policy.quarantine and (loop or self.probing) else "backoff"


class World:
    """Slot 0 is the gateway, the others are models."""

    def __init__(self, models: int, kind: int = 0) -> None:
        self.config = CONFIGS[kind]
        self.settings = [_GATEWAY_SETTINGS[kind], *[_MODEL_SETTINGS[kind]] * models]
        self.slots = [Slot() for _ in self.settings]
        self.accounts = [Account(desired=False) for _ in self.settings]
        self.processes: list[Process | None] = [None] * len(self.settings)
        self.now = 0.0
        self.pids = 0
        self.breaker = Breaker()
        self.trouble: list[tuple[float, int]] = []
        self.open_until = 0.0
        self.last_start = -NEVER
        #: The system refuses to start processes.
        self.refuses = False
        self.quiet = False
        #: Something happened since the last `pump`.
        self.changed = False
        #: What came to pass, so that a test can tell that it was tested.
        self.seen: set[str] = set()

    # -- the host's side ----------------------------------------------------------------------------------------

    def feed(self, i: int, event: ev.Event) -> tuple[Action, ...]:
        slot, actions = advance(self.slots[i], event, self.now, self.settings[i])
        self.slots[i], self.changed = slot, True
        for action in actions:
            self._carry_out(i, action)
        process, account = self.processes[i], self.accounts[i]
        assert slot.wanted == account.desired, "what the operator wants was changed"
        if process is not None:
            assert slot.pid == process.pid, "the slot has lost its process"
            assert slot.alive, "a process without a state of the living"
            return actions
        assert slot.pid == 0, "the slot has made up a process"
        if slot.waiting:
            assert account.desired
        elif account.desired:
            assert slot.state is ModelState.QUARANTINED, "wanted, and nothing will ever start it"
            assert self.settings[i].policy.quarantine, "the gateway is never given up"
        else:
            assert slot.state is ModelState.STOPPED
        return actions

    def _carry_out(self, i: int, action: Action) -> None:
        process, now, config = self.processes[i], self.now, self.config
        assert process is not None, "something is to be done to no process"
        gib = self.slots[i].weight_bytes / GIB
        match action:
            case Action.ASK_DRAIN:
                assert process.ready_at >= 0
                process.drain_at = now
            case Action.ASK_STOP:
                assert process.asked_at < 0
                assert process.dumped_at < 0
                process.asked_at = now
            case Action.DUMP_STACKS:
                assert process.dumped_at < 0
                assert process.asked_at < 0
                assert process.overdue(config, gib) <= now, "ended for a hang, and was in time"
                process.dumped_at = now
            case Action.TERMINATE:
                assert process.dumped_at >= 0
                assert now >= process.dumped_at + DUMP_TO_TERM_S, "no time for the stack dump"
                process.term_at = now
            case Action.KILL:
                if process.killed_at < 0 and process.dumped_at >= 0:
                    assert process.term_at >= 0
                    assert now >= process.dumped_at + DUMP_TO_TERM_S + TERM_TO_KILL_S
                elif process.killed_at < 0:
                    assert process.asked_at >= 0, "killed without a word"
                    assert now >= process.asked_at + self._grace(gib), "killed within its grace"
                    falls = min(process.fell_at + 5, process.asked_at + self.config.stop_falling_max_s)
                    assert process.fell_at <= process.asked_at or now >= falls, "killed while its memory still fell"
                self.seen.add("hung and killed" if process.dumped_at >= 0 else "stubborn and killed")
                process.killed_at = now

    def _grace(self, gib: float) -> float:
        config = self.config
        return min(max(config.stop_min_s, config.stop_base_s + config.stop_per_gib_s * gib), config.stop_max_s)

    def pump(self) -> None:
        """Start what is due, as the host does after everything that happens."""
        if not self.changed:
            return
        self.changed = False
        now, gateway = self.now, self.slots[GATEWAY]
        if gateway.waiting:
            while gateway.waiting and gateway.retry_at <= now:
                self._start(GATEWAY)
                gateway = self.slots[GATEWAY]
            account = self.accounts[GATEWAY]
            assert self.processes[GATEWAY] is not None or account.not_before > now, "the gateway was to be started"
        while True:
            models = self.slots[1:]
            chosen = may_start(models, now)
            if chosen is None or start_allowed_at(self.breaker, now, self.config) > now:
                break
            self._start(chosen + 1)
        self._nobody_is_forgotten()

    def _start(self, i: int) -> None:
        account, slot, now = self.accounts[i], self.slots[i], self.now
        assert self.processes[i] is None, "two processes in one slot"
        assert account.desired, "an unwanted model is started"
        assert account.aside < 0, "a model in quarantine is started"
        assert slot.retry_at == account.not_before, "not when it was to be"
        assert account.not_before <= now, "before its delay is over"
        degraded = slot.next_degraded(self.config)
        asks = account.last is not None and account.last.degrade and bool(account.failed)
        assert degraded == (account.probing or asks or len(account.failed) + 1 >= self.config.degraded_from_try)
        if i != GATEWAY:
            assert not self._loading(), "two models load at a time"
            every = self.config.breaker_start_every_s
            assert now >= self.open_until or now >= self.last_start + every, "the breaker is open"
            waits = [a.not_before for a in self._waiting()]
            assert account.not_before == min(waits), "another one waits for longer"
            if now < self.open_until:
                self.seen.add("rationed by the breaker")
            if account.probing or account.failed:
                self.seen.add("started after failures")
            if degraded:
                self.seen.add("degraded")
            self.last_start = now
            self.breaker = after_start(self.breaker, now)
        if self.refuses:
            slot_before = self.slots[i]
            self.feed(i, ev.SpawnFailed(REFUSED))
            self._failed(i, REFUSED, -1.0, 0.0)
            assert self.slots[i].incarnation == slot_before.incarnation
            return
        self.pids += 1
        self.processes[i] = Process(self.pids, now)
        self.feed(i, ev.Started(self.pids, self.pids, degraded))

    def _loading(self) -> bool:
        for process in self.processes[1:]:  # noqa: SIM110 - a generator takes twice as long
            if process is not None and process.coming_up:
                return True
        return False

    def _waiting(self) -> list[Account]:
        return [
            account
            for account, process in zip(self.accounts[1:], self.processes[1:], strict=True)
            if account.desired and process is None and account.aside < 0 and account.not_before <= self.now
        ]

    def _nobody_is_forgotten(self) -> None:
        for process in self.processes[1:]:
            if process is None:
                break
        else:
            return
        if self._loading() or not self._waiting():
            return
        every = self.config.breaker_start_every_s
        assert self.now < min(self.open_until, self.last_start + every), "a model was to be started"

    # -- what happens -------------------------------------------------------------------------------------------

    def want(self, i: int) -> None:
        account = self.accounts[i]
        if self.processes[i] is None and (not account.desired or account.aside >= 0):
            self._pardon(i)
        account.desired = True
        self.feed(i, ev.Want())

    def _pardon(self, i: int) -> None:
        """An operator's word: failures are forgotten, and what waits is tried at once."""
        account = self.accounts[i]
        account.pardon()
        if self.processes[i] is None and not (account.desired and account.aside < 0 and self._starting(i)):
            account.not_before = self.now
        account.aside = -1.0

    def _starting(self, i: int) -> bool:
        return self.slots[i].state is ModelState.STARTING  # already due: its place in the queue is kept

    def unwant(self, i: int, *, force: bool) -> None:
        account, process = self.accounts[i], self.processes[i]
        account.desired, account.aside = False, account.aside if process is not None else -1.0
        self.feed(i, ev.Unwant(force))
        assert process is None or process.asked_at >= 0 or process.dumped_at >= 0 or process.drain_at >= 0

    def restart(self, i: int, *, force: bool) -> None:
        self._pardon(i)
        self.accounts[i].desired = True
        self.feed(i, ev.Restart(force))
        process = self.processes[i]
        assert process is None or process.asked_at >= 0 or process.dumped_at >= 0 or process.drain_at >= 0

    def reset(self, i: int) -> None:
        if self.accounts[i].desired:
            self._pardon(i)
        else:
            self.accounts[i].pardon()
        self.feed(i, ev.Reset())

    def set_aside(self, i: int) -> None:
        if self.processes[i] is None and i != GATEWAY:
            self.accounts[i].desired, self.accounts[i].aside = True, NEVER
        self.feed(i, ev.SetAside("the machine panicked"))

    def progress(self, i: int) -> None:
        """The process of a slot gets one step further."""
        process = self.processes[i]
        if process is None or process.mute:
            return
        now, going = self.now, process.asked_at >= 0 or process.dumped_at >= 0
        process.sign_at = now
        if process.phase is None:
            process.phase = Phase.LOADING
            process.since, process.moved_at = now, now
            self.feed(i, ev.Helloed())
        elif process.phase is Phase.LOADING:
            process.phase = Phase.WARMING
            if not going:
                process.since = now
            self.feed(i, ev.Beat(Phase.WARMING, process.step))
        elif process.phase is Phase.WARMING:
            process.phase = Phase.IDLE
            if not going:
                process.ready_at = now
                self.accounts[i].load_s = 7.0 * i
            self.feed(i, ev.BecameReady(7.0 * i))
        else:
            process.phase = Phase.DECODE if process.phase is Phase.PREFILL else Phase.PREFILL
            process.step += 1
            process.step_at = now
            self.feed(i, ev.Beat(process.phase, process.step))

    def idle(self, i: int) -> None:
        process = self.processes[i]
        if process is None or process.mute or process.ready_at < 0:
            return
        process.phase, process.sign_at, process.step_at = Phase.IDLE, self.now, self.now
        self.feed(i, ev.Beat(Phase.IDLE, process.step))

    def fall_silent(self, i: int, *, stuck: bool) -> None:
        """It beats no more, or it beats without making a step."""
        process = self.processes[i]
        if process is not None and not self.quiet:
            process.stuck |= stuck
            process.mute |= not stuck

    def wake_up(self, i: int) -> None:
        process = self.processes[i]
        if process is not None:
            process.mute = process.stuck = False

    def drained(self, i: int) -> None:
        process = self.processes[i]
        if process is not None and not process.mute:
            process.sign_at = self.now
            self.feed(i, ev.HasDrained())
            assert process.drain_at < 0 or process.asked_at >= 0 or process.dumped_at >= 0

    def weigh(self, i: int, footprint: int) -> None:
        process = self.processes[i]
        if process is None:
            return
        stopping = process.asked_at >= 0 or process.dumped_at >= 0
        if stopping and footprint < process.footprint * 0.99:
            process.fell_at = self.now
        process.footprint = footprint
        self.feed(i, ev.Weighed(footprint))

    def grow(self, i: int, gib: int) -> None:
        if self.processes[i] is None:
            self.slots[i] = weigh(self.slots[i], gib * GIB)

    def stray(self, i: int, event: ev.Event) -> None:
        """The words of a process that is gone arrive late."""
        if self.processes[i] is None:
            before = self.slots[i]
            assert self.feed(i, event) == ()
            assert self.slots[i] == before, "a dead process was listened to"

    def end(self, i: int, end: ExitRecord, luck: float = 0.0) -> None:
        """The process of a slot is gone."""
        process, account = self.processes[i], self.accounts[i]
        if process is None:
            return
        self.processes[i] = None
        asked = process.asked_at >= 0
        end = HUNG if process.dumped_at >= 0 else ASKED if asked else end
        if i != GATEWAY and end.counted and account.desired and not asked:
            self._count(i)
        ready_for = self.now - process.ready_at if process.ready_at >= 0 else -1.0
        account.last = end
        self.feed(i, ev.Exited(end, luck))
        if not account.desired:
            account.aside = -1.0
            assert self.slots[i].state is ModelState.STOPPED
        elif asked:
            account.not_before = self.now
            assert self.slots[i].state is ModelState.STARTING
        else:
            self._failed(i, end, ready_for, luck)

    def _failed(self, i: int, end: ExitRecord, ready_for: float, luck: float) -> None:
        account, delays = self.accounts[i], self.config.probe_delays_s
        account.last = end
        state = account.fail(self.settings[i].policy, end, ready_for, self.now, luck)
        assert self.slots[i].state.value == state, f"after {end.name} it is {self.slots[i].state.value}, not {state}"
        if account.forgiven:
            self.seen.add("forgiven")
        if state == "quarantined":
            account.probing = False
            again = delays and end.probe and not end.permanent
            account.aside = self.now + delays[min(account.probes, len(delays) - 1)] if again else NEVER
            self.seen.add("set aside" if again else "set aside for good")

    def _count(self, i: int) -> None:
        """A counted failure of a model, for the breaker: the host's way and ours."""
        config, now = self.config, self.now
        self.breaker = after_failure(self.breaker, str(i), now, config)
        self.trouble.append((now, i))
        recent = [who for at, who in self.trouble if now - at <= config.breaker_window_s][-config.breaker_failures :]
        if now < self.open_until or (len(recent) >= config.breaker_failures and len(set(recent)) > 1):
            self.open_until = now + config.breaker_open_s
            self.seen.add("the breaker opened")

    # -- time ---------------------------------------------------------------------------------------------------

    def pass_time(self, seconds: float, late: float = 0.0) -> None:
        """Let time pass until the next deadline of anybody, at most `seconds`; the supervisor wakes `late`."""
        until = self.now + seconds
        for slot, process, settings in zip(self.slots, self.processes, self.settings, strict=True):
            if process is not None and process.beats and process.drain_at < 0:
                if process.stuck or process.coming_up:
                    until = min(until, max(process.limit(self.config, slot.weight_bytes / GIB), self.now))
                continue  # its heartbeats arrive in time
            when = next_deadline(slot, settings)
            if when is not None and (process is not None or when > self.now):
                until = min(until, max(when, self.now))
        self.now = until + late
        self.changed = True
        for i, process in enumerate(self.processes):
            if process is not None and not process.mute and process.phase is not None:
                self._beat(i, process)
        self._tick_all()

    def _beat(self, i: int, process: Process) -> None:
        now = self.now
        process.sign_at = now
        if not process.stuck:
            process.step_at = now
            process.step += 1
            if process.phase is Phase.LOADING:
                process.moved_at = now
                process.moved += 1
                self.feed(i, ev.Moved(process.moved, 100_000))
        elif process.phase is Phase.IDLE:
            process.step_at = now
        assert process.phase is not None
        self.feed(i, ev.Beat(process.phase, process.step))

    def sleep(self, seconds: float) -> None:
        """The machine sleeps: nobody runs, and nobody is blamed for it."""
        self.now += self.config.slept_s + seconds
        self.seen.add("slept")
        for i, process in enumerate(self.processes):
            assert self.feed(i, ev.Tick(self.config.slept_s + seconds)) == (), "blamed for a sleep"
            if process is not None:
                process.since = process.sign_at = process.moved_at = process.step_at = self.now
                for name in ("asked_at", "dumped_at", "drain_at"):
                    if getattr(process, name) >= 0:
                        setattr(process, name, self.now)
        self._tick_all()

    def _tick_all(self) -> None:
        now, config = self.now, self.config
        for i, settings in enumerate(self.settings):
            account, process = self.accounts[i], self.processes[i]
            ticks = 0
            while not self.slots[i].waiting:
                when = next_deadline(self.slots[i], settings)
                assert when is not None or process is None, "a process without a deadline"
                if when is None or when > now:
                    break
                assert ticks < 3, "a deadline that no tick moves"
                ticks += 1
                self.feed(i, ev.Tick())
            if process is not None:
                self._in_time(i, process)
                if account.probing and process.ready_at >= 0 and process.ready_at + config.stable_s <= now:
                    self._stable(i, account, process)
            elif account.desired and 0 <= account.aside <= now:
                account.aside, account.probing, account.not_before = -1.0, True, now
                account.probes += 1
                self.seen.add("tried again")

    def _stable(self, i: int, account: Account, process: Process) -> None:
        """A probe that stayed ready ends the quarantine, unless it is already on its way out."""
        if process.asked_at < 0 and process.dumped_at < 0 and process.drain_at < 0:
            account.pardon()
            self.seen.add("a probe stayed ready")
            assert not self.slots[i].probing

    def _in_time(self, i: int, process: Process) -> None:
        """Whoever is out of time has been told."""
        now, gib = self.now, self.slots[i].weight_bytes / GIB
        if process.killed_at >= 0:
            return
        if process.dumped_at >= 0:
            assert process.term_at >= 0 or now < process.dumped_at + DUMP_TO_TERM_S
            assert now < process.dumped_at + DUMP_TO_TERM_S + TERM_TO_KILL_S, "a hung process was not killed"
        elif process.asked_at >= 0:
            until = process.asked_at + self._grace(gib)
            if process.fell_at > process.asked_at:
                until = max(until, min(process.fell_at + 5, process.asked_at + self.config.stop_falling_max_s))
            assert now < until, "a process that does not stop was not killed"
        else:
            assert now < process.overdue(self.config, gib), "a hang was not seen"
            assert process.drain_at < 0 or now < process.drain_at + self.config.drain_s, "it drains for too long"

    def supervisor_dies(self) -> None:
        """The next supervisor adopts what lives and can speak, and ends the rest; it remembers no failures."""
        living = self.processes
        self.breaker, self.trouble, self.open_until, self.last_start = Breaker(), [], 0.0, -NEVER
        desired = [account.desired for account in self.accounts]
        self.accounts = [Account(desired=False) for _ in desired]
        self.processes = [None] * len(living)
        weights = [slot.weight_bytes for slot in self.slots]
        self.slots = [weigh(Slot(), weight) for weight in weights]
        for i, process in enumerate(living):
            if not desired[i]:
                continue
            self.want(i)
            if process is None:
                continue
            if process.mute or process.asked_at >= 0 or process.dumped_at >= 0 or process.drain_at >= 0:
                continue
            if process.phase is None:
                process.phase = Phase.LOADING
            adopted = self.processes[i] = Process(process.pid, self.now)
            adopted.phase = process.phase
            adopted.stuck = process.stuck
            adopted.ready_at = -1.0 if process.ready_at < 0 else self.now
            self.seen.add("adopted")
            self.feed(i, ev.Adopted(adopted.pid, adopted.pid, adopted.phase))
        self.pump()

    # -- the end ------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """With healthy processes and an operator at rest, everything comes to the state that was asked for."""
        self.quiet, self.refuses = True, False
        for _ in range(400):
            busy = False
            for i, process in enumerate(self.processes):
                if process is None:
                    continue
                process.mute = process.stuck = False
                if process.asked_at >= 0 or process.dumped_at >= 0:
                    self.end(i, ASKED)
                    busy = True
                elif process.drain_at >= 0:
                    self.drained(i)
                    busy = True
                elif process.ready_at < 0:
                    self.progress(i)
                    busy = True
            waits = any(slot.waiting for slot in self.slots) or any(0 <= a.aside < NEVER for a in self.accounts)
            if not busy and not waits:
                break
            self.pump()
            if not busy:
                self.pass_time(self.config.breaker_start_every_s)
                self.pump()
        for slot, account in zip(self.slots, self.accounts, strict=True):
            expected = {ModelState.STOPPED}
            if account.desired:
                expected = {ModelState.QUARANTINED} if account.aside == NEVER else {ModelState.READY}
            assert slot.state in expected, "it never came to rest"


def described(world: World) -> str:
    """The state of every slot, for the message of a failure."""
    return "\n".join(f"{i}: {msgspec.json.encode(slot).decode()}" for i, slot in enumerate(world.slots))
