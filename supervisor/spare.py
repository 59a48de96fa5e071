"""The warm spare: at most one process that has imported everything, given to the next model that is to be loaded."""

import contextlib
import signal
import time
from collections.abc import Callable
from typing import Final

from protocol import PROTOCOL_VERSION, control
from protocol.channel import Channel, ChannelClosedError
from protocol.config import LifecycleConfig
from protocol.messages import encode
from supervisor.children import Child
from supervisor.journal import Journal
from supervisor.launch import SPARE, Launcher
from supervisor.platform.base import Platform
from supervisor.server import Connection

#: A spare that dies is not started again at once: something is wrong with the machine or the installation.
_AFTER_DEATH_S: Final = 60.0


class Spare:
    """Owns the spare process. `changed` is called when there is one more or less process."""

    def __init__(
        self,
        launcher: Launcher,
        platform: Platform,
        journal: Journal,
        config: LifecycleConfig,
        changed: Callable[[], None],
    ) -> None:
        self._launcher = launcher
        self._config = config
        self._platform = platform
        self._journal = journal
        self._changed = changed
        self._channel: Channel | None = None
        self._not_before = 0.0
        #: Beats since it was last heard. Not seconds: a machine that sleeps sends none.
        self._unanswered = 0
        self.child: Child | None = None
        self.incarnation = 0

    @property
    def ready(self) -> bool:
        """Whether it waits for a model, and not frozen as far as the last beat can tell."""
        there = self.child is not None and self._channel is not None and not self._channel.closed
        return there and self._unanswered <= 1

    def start(self, incarnation: int, now: float) -> bool:
        """Start one if there is none and none died lately; return whether one was started."""
        if self.child is not None or now < self._not_before:
            return False
        try:
            self.child = self._launcher.spare(incarnation, self._ended)
        except OSError:
            self._not_before = now + _AFTER_DEATH_S
            return False
        self.incarnation = incarnation
        self._unanswered = 0
        self._journal.write("spare_started", pid=self.child.pid, incarnation=incarnation)
        self._changed()
        return True

    async def serve(self, hello: control.SpareHello, connection: Connection) -> bool:
        """Keep the connection of our spare, or adopt one of an earlier supervisor; return False for a stranger."""
        if hello.pid != connection.pid or hello.protocol != PROTOCOL_VERSION:
            return False
        if self.child is None:
            started = self._platform.process_started(hello.pid)
            if started is None:
                return False
            try:
                self.child = Child(self._platform, hello.pid, started, self._ended)
            except ProcessLookupError:
                return False
            self.incarnation = hello.incarnation
            self._journal.write("process_adopted", slot=SPARE, pid=hello.pid, incarnation=hello.incarnation)
        elif self.child.pid != hello.pid:
            return False
        self._channel = connection.channel
        self._unanswered = 0
        self._changed()
        with contextlib.suppress(ChannelClosedError):
            while True:
                await connection.receive()
                if self._channel is connection.channel:
                    self._unanswered = 0
        return True

    def take(self, spec: bytes) -> Child | None:
        """Turn the spare into the worker of `spec`; return its process, None if there is none ready."""
        if not self.ready or self.child is None or self._channel is None:
            return None
        try:
            self._channel.send(encode(control.Assign(spec)))
        except ChannelClosedError:
            return None
        child, self.child, self._channel = self.child, None, None
        return child

    def ping(self) -> None:
        """Renew its lease and hear whether it lives: one that does not answer is ended, and would not be missed."""
        if self.child is None:
            return
        limit_s = self._config.load_base_s if self._channel is None else self._config.heartbeat_hung_s
        if self._unanswered * self._config.heartbeat_s >= limit_s:
            self.child.signal(signal.SIGKILL)
        self._unanswered += 1
        self._tell(control.Ping())

    def stop(self) -> None:
        """Ask it to end; it has nothing to finish."""
        self._not_before = float("inf")
        if not self._tell(control.Stop("asked")) and self.child is not None:
            self.child.signal(signal.SIGKILL)

    def _tell(self, message: control.Ping | control.Stop) -> bool:
        if self._channel is None:
            return False
        try:
            self._channel.send(encode(message))
        except ChannelClosedError:
            return False
        return True

    def _ended(self, returncode: int | None) -> None:
        assert self.child is not None
        self._journal.write("spare_exited", level="WARNING", pid=self.child.pid, code=returncode)
        self.child = self._channel = None
        self._not_before = max(self._not_before, time.monotonic() + _AFTER_DEATH_S)
        self._changed()
