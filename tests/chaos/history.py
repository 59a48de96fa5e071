"""What every client saw during a run with faults, and the checker that says whether it was allowed.

The promises: a request ends exactly once; its text is the text of its own prompt, whole or, where it ended with an
error, the beginning of it; a stream that began with 200 has an end; errors are typed; usage counts each token once.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Errors a client may be told while faults are injected.
TYPED = frozenset(
    {
        "worker_crashed",
        "model_restarting",
        "model_loading",
        "model_quarantined",
        "request_quarantined",
        "server_busy",
        "shutting_down",
        "timeout",
        "load_shedding",
    }
)


@dataclass
class Outcome:
    """How one request went. `ends` counts [DONE] and error events; `cut` is a connection that broke."""

    model: str
    prompt: str
    stream: bool
    began_at: float
    ended_at: float = 0.0
    status: int = 0
    text: str = ""
    finish: str | None = None
    completion_tokens: int | None = None
    ends: int = 0
    error: dict[str, Any] | None = None
    cut: str = ""
    left: bool = False
    after_end: int = 0

    @property
    def whole(self) -> bool:
        return self.error is None and not self.cut and not self.left and self.finish is not None


@dataclass
class Reference:
    """The uninterrupted answer to a prompt."""

    text: str
    finish: str
    completion_tokens: int


@dataclass
class Verdict:
    """Counts, and every broken promise in words."""

    counts: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    def share(self, model: str) -> float:
        """Return the share of a model's requests that were answered whole, of those whose client stayed."""
        asked = self.counts[f"{model}.asked"]
        return self.counts[f"{model}.whole"] / asked if asked else 1.0


def check(
    outcomes: Iterable[Outcome],
    references: Mapping[str, Reference],
    *,
    limit_s: float,
    gateway_deaths: Iterable[float] = (),
    slack_s: float = 2.0,
) -> Verdict:
    """Judge a history. Connections may break only around a death of the gateway."""
    deaths = sorted(gateway_deaths)
    verdict = Verdict()
    for outcome in outcomes:
        if not outcome.left:
            verdict.counts[f"{outcome.model}.asked"] += 1
        for problem in _problems(outcome, references[outcome.prompt], limit_s, deaths, slack_s):
            verdict.broken.append(f"{outcome.model} {'stream' if outcome.stream else 'whole'}: {problem}")
        if outcome.whole:
            verdict.counts[f"{outcome.model}.whole"] += 1
        elif outcome.error is not None:
            verdict.counts[f"{outcome.model}.{outcome.error.get('code')}"] += 1
        elif outcome.cut:
            verdict.counts[f"{outcome.model}.cut"] += 1
    return verdict


def ended_by_two_deaths(outcome: Outcome, killed: Iterable[tuple[float, str]]) -> bool:
    """Return whether a request met two deaths of its model's process and ended with the error for that (design 7).

    On a busy machine a model may need longer to come back than until it is killed again. `killed`: when, and which.
    """
    deaths = sum(model == outcome.model and outcome.began_at <= at <= outcome.ended_at for at, model in killed)
    return deaths > 1 and outcome.error is not None and outcome.error.get("code") == "worker_crashed"


def _problems(
    outcome: Outcome, reference: Reference, limit_s: float, deaths: list[float], slack_s: float
) -> Iterable[str]:
    if outcome.ended_at - outcome.began_at > limit_s:
        yield f"took {outcome.ended_at - outcome.began_at:.1f} s"
    if outcome.after_end:
        yield "something came after its end"
    if outcome.left:
        if not reference.text.startswith(outcome.text):
            yield "text of something else (client left)"
        return
    if outcome.cut:
        if not any(outcome.began_at - slack_s <= at <= outcome.ended_at + slack_s for at in deaths):
            yield f"connection broke ({outcome.cut}) although the gateway lived"
        return
    if outcome.stream and outcome.status == 200 and outcome.ends != 1:
        yield f"a stream with {outcome.ends} ends"
    if outcome.error is not None:
        if outcome.error.get("code") not in TYPED or not outcome.error.get("request_id"):
            yield f"untyped error {outcome.error.get('code')}"
        if not reference.text.startswith(outcome.text):
            yield "text of something else before its error"
        return
    yield from _differences(outcome, reference)


def _differences(outcome: Outcome, reference: Reference) -> Iterable[str]:
    """Say how an answer that looks whole differs from the uninterrupted one."""
    if outcome.status != 200:
        yield f"status {outcome.status} without an error"
    elif outcome.text != reference.text:
        yield "another text than uninterrupted"
    elif outcome.finish != reference.finish:
        yield f"finish {outcome.finish}, not {reference.finish}"
    elif outcome.completion_tokens != reference.completion_tokens:
        yield f"{outcome.completion_tokens} tokens counted, not {reference.completion_tokens}"
