"""The engine loop: obey commands, step the batch, hand over the tokens. It knows nothing of MLX or of sockets."""

from collections.abc import Callable, Sequence
from queue import Empty, Queue
from time import monotonic
from typing import Any, Final

from protocol.states import Phase
from worker.gather import Gathering
from worker.jobs import Backend, Command, End, Event, Job, Relieve, Remove, Scores, Status, Stepped

#: An idle engine looks up this often; commands wake it at once, so this bounds nothing a client can feel.
_IDLE_WAIT_S: Final = 5.0


class Engine:
    """Drives one backend from the main thread. Whatever the backend raises is fatal to the process.

    An exception inside a step leaves every sequence of the batch in an unknown state (mlx-lm), and Metal reports a
    failure late, maybe on another request's operation: there is nothing to go on with.
    """

    def __init__(
        self,
        backend: Backend,
        commands: "Queue[Command]",
        emit: Callable[[Event], None],
        status: Status,
        *,
        reports: Callable[[int, Any, Scores], Event] = Stepped,
        canary: Callable[[], None] = lambda: None,
        canary_idle_s: float = float("inf"),
        relieve: Callable[[Relieve], None] = lambda _command: None,
    ) -> None:
        self._backend = backend
        self._commands = commands
        self._emit = emit
        self._status = status
        #: Makes the event of a step: its number, what it brought, what that was worth.
        self._reports = reports
        #: Generates one token; run whenever the engine has been idle for so long, to learn of a dead GPU before a
        #: client does.
        self._canary = canary
        self._canary_idle_s = canary_idle_s
        self._canary_at = monotonic() + canary_idle_s
        self._relieve = relieve
        self._gathering = Gathering()
        #: Jobs that wait for others to begin with.
        self._held: dict[int, Job] = {}

    def run(self) -> End:
        """Serve until told to end."""
        while True:
            end = self._obey()
            if end is not None:
                return end
            self._begin()
            if len(self._backend):
                self._step()
            elif monotonic() >= self._canary_at:
                self._run_canary()

    def _obey(self) -> End | None:
        """Apply all commands that are there; without work, wait for one."""
        while True:
            try:
                command = self._next_command()
            except Empty:
                return None
            match command:
                case Job():
                    self._held[command.id] = command
                    self._gathering.came(command.coming, monotonic())
                case Remove():
                    self._remove(command.jobs)
                case Relieve():
                    self._relieve(command)
                case End():
                    return command

    def _next_command(self) -> Command:
        if len(self._backend):
            return self._commands.get_nowait()
        if self._held:
            wait_s = self._gathering.wait_s(monotonic())
            return self._commands.get(timeout=wait_s) if wait_s else self._commands.get_nowait()
        self._status.phase = Phase.IDLE
        command = self._commands.get(timeout=min(_IDLE_WAIT_S, max(0.0, self._canary_at - monotonic())))
        # Before the phase changes: a heartbeat in between must not show a busy engine with the age of its idling.
        self._status.step_at = monotonic()
        return command

    def _begin(self) -> None:
        """Give the backend the jobs that have waited for long enough."""
        if self._held and not self._gathering.wait_s(monotonic()):
            for job in self._held.values():
                self._backend.insert(job)
            self._held.clear()
            self._gathering.begin()

    def _remove(self, jobs: Sequence[int]) -> None:
        for job in jobs:
            self._held.pop(job, None)
        if not self._held:
            self._gathering.begin()
        self._backend.remove(jobs)

    def _step(self) -> None:
        status = self._status
        status.phase = Phase.PREFILL if self._backend.prefilling else Phase.DECODE
        before = len(self._backend)
        brought = self._backend.step()
        status.step += 1
        status.step_at = monotonic()
        if len(self._backend) < before:
            self._gathering.ended(before - len(self._backend), status.step_at)
        self._canary_at = status.step_at + self._canary_idle_s
        if brought:
            self._emit(self._reports(status.step, brought, self._backend.scores))

    def _run_canary(self) -> None:
        """Generate a token for nobody. Shown as decoding, so that one that never comes is found like any other hang."""
        status = self._status
        status.step_at = monotonic()
        status.phase = Phase.DECODE
        self._canary()
        status.step += 1
        status.step_at = monotonic()
        self._canary_at = status.step_at + self._canary_idle_s
