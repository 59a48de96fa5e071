"""When the supervisor should not trust itself or a model after a restart: pure rules over what was written down."""

from typing import Final

import msgspec

from protocol.config import LifecycleConfig

_DAY_S: Final = 86_400.0
#: (strikes, within seconds) that keep everything unloaded until an operator says `resume`.
_STRIKE_RULES: Final = ((2, _DAY_S), (3, 3 * _DAY_S))
_MAX_STRIKES: Final = 16


class Strike(msgspec.Struct, frozen=True):
    """The machine panicked while a model was being loaded. `at` is Unix time in seconds."""

    model: str
    at: float
    reason: str


def crash_loop_of_supervisor(starts: tuple[float, ...], now: float, config: LifecycleConfig) -> str:
    """Return why the supervisor's own starts are a crash loop, "" if they are none. `starts` are since a clean stop."""
    recent = sum(0 <= now - at <= config.safe_mode_s for at in starts)
    if recent < config.safe_mode_starts:
        return ""
    return f"{recent} starts of the supervisor within {config.safe_mode_s:.0f} s"


def panic_loop(strikes: tuple[Strike, ...], now: float) -> str:
    """Return why kernel panics keep everything unloaded, "" if they do not."""
    for count, within_s in _STRIKE_RULES:
        if sum(now - strike.at <= within_s for strike in strikes) >= count:
            return f"{count} kernel panics within {within_s / 3600:.0f} h while a model was being loaded"
    return ""


def with_strike(strikes: tuple[Strike, ...], strike: Strike) -> tuple[Strike, ...]:
    """Return the strikes with one more, bounded."""
    return (*strikes, strike)[-_MAX_STRIKES:]


def without_model(strikes: tuple[Strike, ...], model: str) -> tuple[Strike, ...]:
    """Return the strikes of the other models."""
    return tuple(strike for strike in strikes if strike.model != model)


def struck(strikes: tuple[Strike, ...], model: str) -> str:
    """Return the words of a model's newest strike, "" if it has none."""
    return next((strike.reason for strike in reversed(strikes) if strike.model == model), "")
