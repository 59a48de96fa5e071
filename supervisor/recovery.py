"""What becomes of the models that were live when the last supervisor ended without having been told to."""

from collections.abc import Iterable

from protocol.states import ModelState
from supervisor.journal import Journal


class Recovery:
    """Writes down which of them are back, and which failed to come. One per supervisor."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._missing: set[str] = set()

    def expect(self, models: Iterable[str]) -> None:
        """These were live."""
        self._missing = set(models)

    def on_state(self, model: str, state: ModelState, reason: str) -> None:
        """A model has come into a state. One that failed and then comes is back all the same."""
        if model not in self._missing:
            return
        if state is ModelState.READY:
            self._missing.discard(model)
            self._journal.write("crash_recovery_model_restored", model=model)
        elif state in {ModelState.BACKOFF, ModelState.QUARANTINED}:
            self._journal.write("crash_recovery_model_failed", level="ERROR", model=model, reason=reason)
