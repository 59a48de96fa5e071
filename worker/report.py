"""What a worker says about itself to the supervisor. IO thread only."""

import os
from time import monotonic

from protocol import PROTOCOL_VERSION, __version__
from protocol.control import Drained, Heartbeat, Loading, Ready, WorkerHello
from protocol.messages import Message
from protocol.spec import WorkerSpec
from protocol.states import Phase
from worker.jobs import Loaded, LoadProgress, Serving, Status
from worker.requests import Book


class Report:
    """Makes the hello, the heartbeat and the news in between, from what is known of the engine."""

    def __init__(self, spec: WorkerSpec, status: Status) -> None:
        self._spec = spec
        self._status = status
        self._loading: Loading | None = None
        self._loaded: Loaded | None = None
        self._load_s = 0.0
        self.draining = False
        self.drained = False

    def on_progress(self, progress: LoadProgress) -> Loading:
        """Note and return how much of the model is in memory."""
        self._loading = Loading(progress.done_bytes, progress.total_bytes, progress.stage)
        return self._loading

    def on_serving(self, serving: Serving) -> Ready:
        """Note and return that the canary has passed."""
        self._loading = None
        self._loaded, self._load_s = serving.loaded, serving.load_s
        return Ready(serving.loaded.capabilities, serving.load_s)

    def introduce(self) -> list[Message]:
        """Return the first frames on a new connection: the whole state, whatever the last supervisor knew."""
        spec = self._spec
        hello = WorkerHello(
            protocol=PROTOCOL_VERSION,
            slot=spec.slot,
            model=spec.model,
            incarnation=spec.incarnation,
            pid=os.getpid(),
            endpoint=spec.endpoint,
            phase=self._phase(),
            version=__version__,
            capabilities=None if self._loaded is None else self._loaded.capabilities,
            load_s=self._load_s,
            source=spec.path,
        )
        messages: list[Message] = [hello]
        if self._loading is not None:
            messages.append(self._loading)
        if self.drained:
            messages.append(Drained())
        return messages

    def heartbeat(self, book: Book | None, phase: Phase | None = None) -> Heartbeat:
        """Return the state of this moment, or of the moment at which `phase` began; `book` is None until it serves."""
        # The phase before the time of the last step: the engine writes them the other way round, so that a busy
        # phase never comes with the age of an idle time.
        phase = phase or self._phase()
        step_at = self._status.step_at
        active, cached, peak = (0, 0, 0) if self._loaded is None else self._loaded.memory()
        return Heartbeat(
            phase=phase,
            step=self._status.step,
            step_age_s=max(0.0, monotonic() - step_at),
            running=0 if book is None else book.running,
            waiting=0 if book is None else book.waiting,
            active_bytes=active,
            cache_bytes=cached,
            peak_bytes=peak,
            requests=0 if book is None else book.admitted,
            concurrent_limit=0 if book is None else book.slots.limit,
            kv_reserved_bytes=0 if book is None else book.slots.room.reserved,
            kv_limit_bytes=0 if book is None else book.slots.room.budget,
        )

    def _phase(self) -> Phase:
        """Return what the engine does; draining shows only when it does nothing, since a drain may hang in a step."""
        phase = self._status.phase
        return Phase.DRAINING if self.draining and phase is Phase.IDLE else phase
