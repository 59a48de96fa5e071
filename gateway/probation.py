"""Who runs after a crash: the requests that were in it one at a time, so that the next crash names its culprit alone.

Pure policy of one model: requests are numbers (`rid`), progress is a number of tokens, and there is no clock.
"""

from collections.abc import Mapping
from typing import Final

#: A suspect has got past the point it died at with so many more tokens than the gateway had of it. One would do if the
#: last tokens of a dying process were never lost on their way; a step or two are, and a culprit that is let off too
#: early leaves its crash to the next suspect.
PAST_TOKENS: Final = 8


class Probation:
    """The suspects of one model. As long as there are any, nobody else starts."""

    def __init__(self) -> None:
        #: Tokens each had when it died, in the order in which they are tried.
        self._suspects: dict[int, int] = {}
        self._on_trial: int | None = None

    @property
    def active(self) -> bool:
        """Whether newcomers have to wait."""
        return bool(self._suspects)

    @property
    def on_trial(self) -> int | None:
        """The one suspect that runs now."""
        return self._on_trial

    def crashed(self, in_flight: Mapping[int, int]) -> set[int]:
        """Note a crash; return its suspects, all of which now have to be tried.

        `in_flight` maps what ran to its number of tokens. With someone on trial it is that one alone: the others had
        got past the point they died at, or have not begun.
        """
        trial = self._on_trial
        culprits = set(in_flight)
        if trial is not None and trial in in_flight:
            self._on_trial = None
            culprits = {trial}
        for rid in culprits:
            self._suspects[rid] = in_flight[rid]
        # Those with the fewest tokens first: what kills a model mostly does so early, and what is tried before it has
        # to sit through its crash once more.
        self._suspects = dict(sorted(self._suspects.items(), key=lambda item: item[1]))
        return culprits

    def next(self) -> int | None:
        """Return the suspect to start now, None while one is on trial or when there is none."""
        return next(iter(self._suspects), None) if self._on_trial is None else None

    def begin(self, rid: int) -> int:
        """Put a suspect on trial; return the number of tokens with which it has passed."""
        assert self._on_trial is None, "one at a time"
        self._on_trial = rid
        return self._suspects[rid] + PAST_TOKENS

    def interrupt(self, rid: int) -> None:
        """The process gave the request back without a crash: the trial has to be held again."""
        if self._on_trial == rid:
            self._on_trial = None

    def forget(self, rid: int) -> bool:
        """The request has passed, has ended or was given up; return whether it was a suspect."""
        if self._on_trial == rid:
            self._on_trial = None
        return self._suspects.pop(rid, None) is not None
