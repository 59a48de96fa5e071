"""The host breaker on a virtual clock: models that fail together are not restarted together."""

from protocol.config import LifecycleConfig
from supervisor.breaker import Breaker, after_failure, after_start, start_allowed_at

CONFIG = LifecycleConfig()


def fail(names: str, *, every_s: float = 0.1) -> tuple[Breaker, float]:
    breaker, now = Breaker(), 100.0
    for name in names:
        now += every_s
        breaker = after_failure(breaker, name, now, CONFIG)
    return breaker, now


def test_four_failures_of_several_models_at_once_open_it_for_a_minute() -> None:
    breaker, now = fail("abcd")
    assert breaker.open_until == now + 60
    assert start_allowed_at(breaker, now, CONFIG) == now, "the first start is allowed"
    breaker = after_start(breaker, now)
    assert start_allowed_at(breaker, now + 1, CONFIG) == now + 30
    assert start_allowed_at(breaker, now + 30, CONFIG) == now + 30
    breaker = after_start(breaker, now + 30)
    assert start_allowed_at(breaker, now + 31, CONFIG) == now + 60, "then it is closed"


def test_one_model_alone_never_opens_it() -> None:
    breaker, now = fail("aaaaaaaa")
    assert start_allowed_at(after_start(breaker, now), now, CONFIG) == now


def test_failures_far_apart_do_not_open_it() -> None:
    breaker, now = fail("abcdabcd", every_s=4)
    assert start_allowed_at(after_start(breaker, now), now, CONFIG) == now


def test_a_failure_while_it_is_open_keeps_it_open() -> None:
    breaker, now = fail("abcd")
    again = after_failure(breaker, "a", now + 50, CONFIG)
    assert again.open_until == now + 110
