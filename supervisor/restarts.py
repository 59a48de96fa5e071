"""When to start a process again, and when to stop trying: pure arithmetic over times of failures (design 6)."""

from typing import Final

import msgspec

from protocol.config import LifecycleConfig

#: A model that loads for minutes needs a window in which five loads fit.
_SLOW_LOADS: Final = 6
#: Times of failures that are kept; thresholds above it never trip.
_MAX_REMEMBERED: Final = 64


class RestartPolicy(msgspec.Struct, frozen=True):
    """Numbers of one kind of process. `quarantine` False: it is tried for ever (the gateway)."""

    delays_s: tuple[float, ...]
    jitter: float
    stable_s: float
    forgive_one_s: float
    forgive_all_s: float
    burst_failures: int
    burst_s: float
    unready_failures: int
    slow_failures: int
    slow_s: float
    quarantine: bool = True


class History(msgspec.Struct, frozen=True):
    """Failures that still count: their times, how many since it was last ready, and the next delay's index."""

    failed_at: tuple[float, ...] = ()
    unready_in_a_row: int = 0
    attempt: int = 0


class Verdict(msgspec.Struct, frozen=True):
    """What follows a failure: start again after `delay_s`, or never with `why`."""

    history: History
    delay_s: float
    why: str | None = None


def worker_policy(config: LifecycleConfig) -> RestartPolicy:
    """Return the policy for model processes."""
    return RestartPolicy(
        delays_s=config.restart_delays_s,
        jitter=config.restart_jitter,
        stable_s=config.stable_s,
        forgive_one_s=config.forgive_one_s,
        forgive_all_s=config.forgive_all_s,
        burst_failures=config.burst_failures,
        burst_s=config.burst_s,
        unready_failures=config.unready_failures,
        slow_failures=config.slow_failures,
        slow_s=config.slow_s,
    )


def gateway_policy(config: LifecycleConfig) -> RestartPolicy:
    """Return the policy for the gateway: always at once the first time, never given up."""
    return msgspec.structs.replace(worker_policy(config), stable_s=0.0, quarantine=False)


def after_failure(
    policy: RestartPolicy,
    history: History,
    *,
    now: float,
    ready_for_s: float | None,
    load_s: float,
    luck: float,
    at_least_s: float = 0.0,
) -> Verdict:
    """Return the verdict on a counted failure at `now`.

    `ready_for_s` is how long the process had been ready, None if it never was; `load_s` how long its loads take;
    `luck` in [-1, 1] spreads the delays so that several models do not start in step; `at_least_s` is what this kind
    of failure asks for.
    """
    history = _forgive(policy, history, ready_for_s)
    unready = history.unready_in_a_row + 1 if ready_for_s is None else 0
    failed_at = (*history.failed_at, now)[-_MAX_REMEMBERED:]
    index = min(history.attempt, len(policy.delays_s) - 1)
    if index == 0 and (ready_for_s is None or ready_for_s < policy.stable_s):
        index = min(1, len(policy.delays_s) - 1)
    delay = max(at_least_s, 0.0, policy.delays_s[index] * (1 + policy.jitter * luck))
    after = History(failed_at, unready, max(index, history.attempt) + 1)
    return Verdict(after, delay, _loop(policy, failed_at, unready, now, load_s) if policy.quarantine else None)


def _forgive(policy: RestartPolicy, history: History, ready_for_s: float | None) -> History:
    if ready_for_s is None:
        return history
    if ready_for_s >= policy.forgive_all_s:
        return History()
    forgiven = int(ready_for_s // policy.forgive_one_s)
    return History(history.failed_at[forgiven:], 0, max(0, history.attempt - forgiven))


def _loop(policy: RestartPolicy, failed_at: tuple[float, ...], unready: int, now: float, load_s: float) -> str | None:
    """Say in words which crash-loop rule is met, None if none is."""
    if unready >= policy.unready_failures:
        return f"failed {unready} times in a row before it was ready"
    if sum(now - t <= policy.burst_s for t in failed_at) >= policy.burst_failures:
        return f"failed {policy.burst_failures} times within {policy.burst_s:.0f} s"
    window = max(policy.slow_s, _SLOW_LOADS * (load_s + 60.0))
    if sum(now - t <= window for t in failed_at) >= policy.slow_failures:
        return f"failed {policy.slow_failures} times within {window:.0f} s"
    return None
